"""Command lines of the launch files: a preset's name, then flags that change its values."""

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

import tyro

from strop.engine.config import InputError
from strop.engine.run.torchrun import Torchrun

Config = TypeVar("Config")


@dataclass(frozen=True)
class _PlanOrConfig(Generic[Config]):
    """A config's flags, and --plan beside them: it is no setting of the run, so no run folder and no resume knows it."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    plan: Annotated[str | None, tyro.conf.arg(metavar="DEVICE[xGPUS]")] = None
    """Print what this run would need and take on so many such GPUs, and stop: h100x8, h200x16, ... (launch/plan.py tiny
    --help lists them). Without a number: on as many as there are processes."""


def parse(
    presets: Mapping[str, tuple[str, Config]],
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    plan: Callable[[Config, int, str], int] | None = None,
    noun: str = "preset",
    or_path: str = "",
) -> tuple[str, Config]:
    """(preset's name, its config with the flags applied). Presets: name -> (what it is for, config).

    plan: adds the flag --plan DEVICE[xGPUS], which calls this on the first rank with (config, GPUS or else the number of ranks,
    DEVICE) and ends the process with the exit code that it returns. noun: what the presets are to people. or_path: which paths
    the caller has put among them, for people.
    Ends the process with exit code 2 and tyro's message, once, for an unknown flag or a value that a config refuses;
    raises InputError for an unknown preset.
    """
    ranks = Torchrun.from_environment()
    first_rank = ranks.rank == 0
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    others = f" {or_path} will do too." if or_path else ""
    if name in ("-h", "--help"):
        if first_rank:
            width = max(10, *map(len, presets))
            listing = "".join(f"\n  {preset:<{width}} {what}" for preset, (what, _) in presets.items())
            usage = f"usage: {sys.argv[0]} {noun.upper()} [flags]\n\n{noun.upper()} --help lists the flags.{others} "
            usage += f"{noun.capitalize()}s:"
            print(f"{description}\n\n{usage}{listing}")
        raise SystemExit(0)
    if name not in presets:
        raise InputError(f"{name!r} is no {noun}: begin with one of {', '.join(presets)}.{others}".removesuffix("."))
    what, preset = presets[name]
    kind, default = (type(preset), preset) if plan is None else (_PlanOrConfig[type(preset)], _PlanOrConfig(preset))
    parsed = tyro.cli(
        kind, default=default, args=flags, prog=f"{sys.argv[0]} {name}",
        description=f"{description}\n\n{noun.capitalize()} {name}: {what}", console_outputs=first_rank,
    )  # fmt: skip
    if plan is None:
        return name, parsed
    if parsed.plan is not None:
        device, gpus = re.fullmatch(r"(.*?)(?:x(\d+))?", parsed.plan.lower()).groups()
        raise SystemExit(plan(parsed.config, int(gpus or ranks.world_size), device) if first_rank else 0)
    return name, parsed.config


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
