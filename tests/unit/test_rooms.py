"""The house rules, read from the source text: who may import whom, who may talk to other ranks, names and sizes.

A room sees itself and what MAY_IMPORT lists; the longest matching name decides. Data flows one way, so train and rollout
never see each other, and kernels can be taken out of the house alone.
"""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOUNS = {"engine.config", "engine.batch", "engine.protocols"}
BELOW_MODEL = NOUNS | {"kernels", "engine.parallel"}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "engine.__init__": set(),
    **{noun: NOUNS | {"kernels"} for noun in NOUNS},
    "engine.parallel": NOUNS,
    "engine.model": BELOW_MODEL,
    "engine.train": BELOW_MODEL | {"engine.model"},
    "engine.rollout": BELOW_MODEL | {"engine.model"},
    "engine.reward.answers": {"engine.batch"},
    "engine.reward": NOUNS,
    "engine.data": NOUNS | {"engine.reward.answers"},
    "engine.evaluate": NOUNS | {"engine.reward.answers"},
    "engine.plan": {"engine.config", "engine.model.config"},
    "engine.run": {"engine.config", "engine.batch", "engine.model.checkpoint"},
    "launch": {"kernels", "engine"},
    "benchmarks": {"kernels", "engine"},
    "tests": {"kernels", "engine", "launch"},
}
# Groups are built and called in parallel alone (kernels: in their tp_group arguments). The others get what can't start a
# conversation of its own: checkpoint writes over a group it was given, a DTensor names the rectangle that a rank holds.
MAY_TALK: dict[str, set[str]] = {
    "kernels": {"torch.distributed"},
    "engine.parallel": {"torch.distributed"},
    "engine.model": {"torch.distributed.checkpoint"},
    "engine.train": {"torch.distributed.tensor"},
    "engine.run": {"torch.distributed.checkpoint"},
    "benchmarks": {"torch.distributed"},
    "tests": {"torch.distributed"},
}
FOLDERS = {".ci", "csrc", "kernels", "engine", "launch", "tests", "benchmarks"}
FILES = {".gitignore", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py"}
TEXT = {"", ".py", ".cpp", ".hpp", ".h", ".cu", ".cuh", ".md", ".sh", ".toml", ".txt"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 400


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def names_used(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `package`'s source, relative ones resolved, and each use of torch.distributed."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            yield from ((node.lineno, name) for name in [ast.unparse(node)] if within(name, {"torch.distributed"}))


def violations(path: str, source: str) -> list[str]:
    """What breaks the rules of this file in the Python source at `path` (relative to the repository's root)."""
    parts = Path(path).with_suffix("").parts
    module, package = ".".join(parts), ".".join(("strop", *parts[:-1]))
    room = max((name for name in MAY_IMPORT if within(module, {name})), key=len, default=None)
    if room is None:
        return [f"{path}: no room of this name; MAY_IMPORT doesn't say what it may see"]
    may_talk = MAY_TALK.get(room, set()) | {"torch.distributed.ProcessGroup"}  # a type, for annotations
    found = []
    for line, name in names_used(ast.parse(source), package):
        if within(name, {"kernels", "engine", "launch", "tests", "benchmarks"}):
            found.append(f"{path}:{line}: {name} is somebody else's package; ours is strop.{name}")
        elif within(name, {"strop"}) and not within(name.removeprefix("strop."), MAY_IMPORT[room] | {room}):
            found.append(f"{path}:{line}: {room} may not see {name}")
        elif within(name, {"torch.distributed"}) and not within(name, may_talk):
            found.append(f"{path}:{line}: {room} may not use {name}; pass it an Axis of engine.parallel")
    return found


def house_files() -> list[Path]:
    """Every file of ours, relative to the root; no build products, no benchmark results."""
    files = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    built = {"__pycache__", "_native", "results"}
    return sorted(path for path in files if not built & set(path.parts)) + [Path(name) for name in FILES - {"LICENSE"}]


def test_every_import_stays_in_its_rooms():
    python = [path for path in house_files() if path.suffix == ".py" and len(path.parts) > 1]
    assert len(python) > 10, f"{ROOT} is not the repository: only {len(python)} Python files"
    assert not [text for path in python for text in violations(path.as_posix(), (ROOT / path).read_text())]


@pytest.mark.parametrize(
    "path, source",
    [
        ("kernels/loss.py", "from strop.engine.config import InputError"),
        ("kernels/loss.py", "def f():\n    from ..engine import batch"),
        ("engine/__init__.py", "from .batch import Group"),
        ("engine/batch.py", "from .parallel import mesh"),
        ("engine/parallel/mesh.py", "from ..model.config import ModelConfig"),
        ("engine/train/step.py", "from ..rollout.engine import InProcessEngine"),
        ("engine/rollout/engine.py", "import strop.engine.train.step"),
        ("engine/rollout/engine.py", "from ... import launch"),
        ("engine/reward/answers.py", "from .rules import exact"),
        ("engine/data/prompts.py", "from ..reward.rules import exact"),
        ("engine/run/state.py", "from ..model.transformer import Transformer"),
        ("engine/run/state.py", "importlib.import_module('strop.engine.train.step')"),
        ("engine/run/state.py", "import strop.engine"),
        ("engine/evaluate/report.py", "from ..model import sources"),
        ("engine/queue/work.py", "import torch"),
        ("launch/grpo.py", "import kernels"),
        ("launch/grpo.py", "from engine.batch import Group"),
        ("benchmarks/step.py", "from strop.launch.grpo import main"),
        ("engine/train/step.py", "import torch.distributed as dist"),
        ("engine/train/step.py", "from torch import distributed"),
        ("engine/train/step.py", "import torch\ntorch.distributed.all_reduce(x)"),
        ("engine/run/state.py", "from torch.distributed import all_reduce"),
    ],
)
def test_checker_finds(path, source):
    assert len(violations(path, source)) == 1, violations(path, source)


@pytest.mark.parametrize(
    "path, source",
    [
        ("kernels/loss.py", "from .reference import loss\nfrom torch.distributed import all_reduce"),
        ("engine/__init__.py", ""),
        ("engine/train/step.py", "from ..model import transformer\nfrom ...kernels import kl"),
        ("engine/train/step.py", "from torch.distributed import ProcessGroup"),
        ("engine/run/state.py", "import torch.distributed.checkpoint as dcp\nfrom ..model.checkpoint import save_hf_folder"),
        ("engine/evaluate/report.py", "from ..reward.answers import last_number\nfrom .estimators import pass_at_k"),
        ("engine/train/step.py", "import torch\nx: torch.distributed.ProcessGroup\nkernels.policy_loss(x)"),
    ],
)
def test_checker_allows(path, source):
    assert violations(path, source) == []


def test_native_sources_are_framework_free():
    foreign = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|Python\.h|pybind11)")
    assert not [str(path) for path in house_files() if path.parts[0] == "csrc" and foreign.search((ROOT / path).read_text())]


def test_names_and_sizes():
    files = house_files()
    vague = [str(path) for path in files if VAGUE & {Path(part).stem.lower() for part in path.parts}]
    assert not vague, f"names that explain nothing: {vague}"
    text = [path for path in files if path.suffix in TEXT]
    long = {str(path): lines for path in text if (lines := len((ROOT / path).read_text().splitlines())) > MAX_LINES}
    assert not long, f"files above {MAX_LINES} lines: {long}"


def test_top_level_is_the_cards():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git clone: which files belong to the repository is known to git alone")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z"]  # the clone may belong to another user
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tops = {(parts[0], len(parts) > 1) for name in listed.split("\0") if name for parts in [Path(name).parts]}
    assert {name for name, is_folder in tops if is_folder} <= FOLDERS
    assert {name for name, is_folder in tops if not is_folder} <= FILES
