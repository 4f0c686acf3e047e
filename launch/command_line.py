"""Command lines of the launch files: a preset's name, then flags that change its values."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

from strop.engine.config import InputError
from strop.engine.run.torchrun import Torchrun

Config = TypeVar("Config")


def parse(
    presets: Mapping[str, tuple[str, Config]], description: str, arguments: Sequence[str] | None = None
) -> tuple[str, Config]:
    """(preset's name, its config with the flags applied). Presets: name -> (what it is for, config).

    Ends the process with exit code 2 and tyro's message, once, for an unknown flag or a value that a config refuses;
    raises InputError for an unknown preset.
    """
    first_rank = Torchrun.from_environment().rank == 0
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        if first_rank:
            listing = "".join(f"\n  {preset:<10} {what}" for preset, (what, _) in presets.items())
            print(f"{description}\n\nusage: {sys.argv[0]} PRESET [flags]\n\nPRESET --help lists the flags. Presets:{listing}")
        raise SystemExit(0)
    if name not in presets:
        raise InputError(f"{name!r} is no preset: begin with one of {', '.join(presets)}")
    what, preset = presets[name]
    config = tyro.cli(
        type(preset), default=preset, args=flags, prog=f"{sys.argv[0]} {name}",
        description=f"{description}\n\nPreset {name}: {what}", console_outputs=first_rank,
    )  # fmt: skip
    return name, config


def this_command(*added: str) -> str:
    """The command line that started this process, without its --run.* flags and with `added` instead."""
    kept: list[str] = []
    value_follows = False
    for argument in sys.argv:
        if argument.startswith("--run."):
            value_follows = "=" not in argument and not argument.endswith("resume")
        elif value_follows:
            value_follows = False
        else:
            kept.append(argument)
    return launch_command(*kept, *added)


def launch_command(*words: str) -> str:
    """A launch file's command line for as many ranks as this process has beside it."""
    ranks = Torchrun.from_environment()
    start = ["torchrun", "--nproc-per-node", str(ranks.local_world_size)] if ranks.world_size > 1 else ["python"]
    return shlex.join([*start, *words])
