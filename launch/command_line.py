"""Command lines of the launch files: a preset's name, then flags that change its values."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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


def next_command(file: str, keep: Callable[[str], bool], *added: str) -> str:
    """A command line for launch file `file`: as this process's, with the flags (by name, such as --seed) that `keep` accepts,
    and `added` at the end. It names this Python, so that it works outside the virtual environment too."""
    preset, flags = sys.argv[1], list[list[str]]()
    for argument in sys.argv[2:]:
        if argument.startswith("--") or not flags:
            flags.append([])
        flags[-1].append(argument)
    kept = [word for flag in flags if keep(flag[0].partition("=")[0].replace("_", "-")) for word in flag]
    ranks = Torchrun.from_environment()
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks.local_world_size)] if ranks.world_size > 1 else []
    return shlex.join([sys.executable, *start, str(Path(sys.argv[0]).with_name(file)), preset, *kept, *added])
