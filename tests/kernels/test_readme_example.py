"""The README's plain-torch GRPO loop runs as printed, with nothing but torch, numpy and strop importable, and learns.

A fresh virtual environment with only these three is tested by .ci/run. The README's TRL and verl snippets run in
test_integrations_trl.py and test_integrations_verl.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import strop.kernels

ROOT = Path(__file__).parents[2]

MISSING = {
    "transformers", "trl", "triton", "liger_kernel", "datasets", "accelerate", "tokenizers", "safetensors", "tyro", "rich",
    "tensorboard", "matplotlib", "pandas", "verl",
}  # fmt: skip
ALONE = f"""
import sys
from importlib.machinery import PathFinder

class FindsNoExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {MISSING} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = FindsNoExtras
"""
OURS = "\nprint(sorted(name for name in sys.modules if name.startswith(('strop.engine', 'strop.launch', 'strop.kernels.int'))))"


def run_alone(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-I", "-c", ALONE + code], capture_output=True, text=True)


def test_the_plain_torch_loop_runs_alone(readme_examples):
    done = run_alone(readme_examples[0] + OURS)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert done.stdout.endswith("\n[]\n"), "strop.kernels imported more of strop"
    rewards = [float(value) for value in re.findall(r"reward (\d\.\d+)", done.stdout)]
    assert len(rewards) == 4
    assert rewards[0] < 0.3 < 0.6 < rewards[-1]


def test_extras_are_really_missing_there():
    for name in ("transformers", "triton"):
        done = run_alone(f"import {name}")
        assert done.returncode == 1 and f"No module named '{name}'" in done.stderr


def test_the_table_of_forms_is_true():
    """Each row against the folders kernels/cpu, triton and cuda."""
    module = {"linear_logprob": "logit_rows", "logprob": "logit_rows", "linear_policy_loss": "policy_loss",
              "moe_unpermute": "moe_permute"}  # fmt: skip
    rows = re.findall(r"^\| (`\w+`.*?) \| (yes|-) \| (yes|-) \| (yes|-) \|$", (ROOT / "README.md").read_text(), re.M)
    said = {op: forms for names, *forms in rows for op in re.findall(r"`(\w+)`", names)}
    files = {op: [ROOT / f"kernels/{form}/{module.get(op, op)}.py" for form in ("cpu", "triton", "cuda")] for op in said}
    found = {op: ["yes" if path.exists() else "-" for path in paths] for op, paths in files.items()}
    assert said == found
    assert set(said) <= set(strop.kernels.__all__) and len(said) >= 13
