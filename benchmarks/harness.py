"""What every benchmark shares: the machine and versions a result belongs to, and where it is written."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "numpy", "trl", "liger_kernel")


def machine() -> dict[str, str]:
    """Device, cores, versions and the command line: what a reader needs to judge or repeat a result."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        device = f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores"
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:  # an optional package that isn't installed
            continue
    threads = [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"] if "OMP_NUM_THREADS" in os.environ else []
    return {"device": device, "date": f"{date.today()}", "python": platform.python_version(), **versions,
            "command": shlex.join([*threads, "python", *sys.argv])}  # fmt: skip


def write_results(name: str, title: str, table: str, data: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write folder/<name>-<cpu|gpu name>-<date>.json and .md; returns the path of the latter. table: Markdown."""
    facts = machine()
    kind = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    stem = folder / f"{name}-{kind}-{facts['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"machine": facts, **data}, indent=2) + "\n")
    lines = "\n".join(f"- {key}: `{value}`" for key, value in facts.items())
    stem.with_suffix(".md").write_text(f"# {title}\n\n{table}\n\n{lines}\n")
    return stem.with_suffix(".md")
