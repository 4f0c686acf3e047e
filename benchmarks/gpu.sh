#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes, without a network: build csrc with nvcc, run the tests marked gpu, every
# kernel benchmark (quick) and a few GRPO steps of the 135M shape with a table of where their time goes.
#
#   bash benchmarks/gpu.sh FOLDER          results: gpu.log, summary.json, and the tables as .md and .json
#   bash benchmarks/gpu.sh --cpu FOLDER    the same on a machine without a GPU, to try the script itself
#
#   PYTHON=python3         an interpreter with torch, numpy, pytest, hypothesis, setuptools >= 77 (and for the engine: what
#                          strop[train] lists). strop itself is installed into a virtual environment in FOLDER, then removed.
#   STROP_WHEELS=DIR       wheels of what that interpreter lacks; beside torch's and transformers' own requirements, rich,
#                          tensorboard, matplotlib and nvidia-ml-py the engine needs tyro, docstring_parser, typeguard, gguf.
#                          trl and liger_kernel there are measured too.
#
# Each part has a time limit of its own, so that one that hangs or fails costs the others nothing. Exit code 1 if a part
# failed; a part that can't run here is skipped, with the reason in the summary.
set -uo pipefail
cd "$(dirname "$0")/.."

on_cpu=
if [ "${1:-}" = --cpu ]; then
    on_cpu=1
    shift
fi
if [ $# -ne 1 ]; then
    echo "usage: bash benchmarks/gpu.sh [--cpu] FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
results=$(cd "$1" && pwd)
python=${PYTHON:-python3}
scratch=$results/scratch
rm -rf "$scratch"
mkdir "$scratch"
trap 'rm -rf "$scratch"' EXIT
export XDG_CACHE_HOME=$scratch/cache TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
export PYTHONUNBUFFERED=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
: >"$results/gpu.log"
: >"$scratch/parts"

record() { # name, exit code ("" when skipped), seconds, why
    printf '%s\t%s\t%s\t%s\n' "$@" >>"$scratch/parts"
}

skip() { # name, why
    echo "=== $1: skipped: $2" | tee -a "$results/gpu.log"
    record "$1" "" 0 "$2"
}

part() { # name, seconds it may take, command...
    local name=$1 limit=$2 began=$SECONDS code why=
    shift 2
    echo "=== $name (at most $limit s): $*" | tee -a "$results/gpu.log"
    timeout --kill-after=10 "$limit" "$@" </dev/null 2>&1 | tee -a "$results/gpu.log"
    code=${PIPESTATUS[0]}
    case $code in 124 | 137) why="stopped at its limit of $limit s" ;; esac
    record "$name" "$code" $((SECONDS - began)) "$why"
    return "$code"
}

# "" where all modules can be imported, else which can't.
missing() { # interpreter, modules...
    "$1" - "${@:2}" <<'END' 2>/dev/null || echo "$1 doesn't run"
import importlib.util, sys
absent = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print(f"not installed: {', '.join(absent)} (STROP_WHEELS=DIR takes their wheels)" if absent else "", end="")
END
}

# Makes $scratch/venv, which sees the packages of $python even where that is a virtual environment itself.
build() {
    "$python" -m venv --without-pip "$scratch/venv" &&
        "$python" -c 'import sys, torch; print(*filter(None, sys.path[1:]), sep="\n")' |
        grep -E 'site-packages|dist-packages' >"$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" &&
        { [ -z "${STROP_WHEELS:-}" ] || "$python" -m pip --python "$scratch/venv/bin/python" install --quiet --no-deps "$STROP_WHEELS"/*.whl; } &&
        "$python" -m pip --python "$scratch/venv/bin/python" install --no-build-isolation --no-deps --editable . &&
        cat kernels/_native/build.txt &&
        (cd / && "$scratch/venv/bin/python" -c "
import sys
from strop.kernels import native
absent = [kind for kind in sys.argv[1:] if native.library(kind) is None]
sys.exit(f'not built: {absent}' if absent else 0)" $libraries)
}
export -f build
export python scratch libraries=cpu STROP_BUILD=strict
if [ -z "$on_cpu" ]; then
    libraries="cpu cuda"
    export STROP_FORCE_CUDA=1  # by nvcc, whether or not the GPU shows in /dev
fi

why=
if [ -z "$on_cpu" ]; then
    why=$("$python" -c 'import torch; print("" if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device")' 2>&1 | tail -1)
fi
[ -n "$why" ] || why=$(missing "$python" torch numpy setuptools pip)
if [ -n "$why" ]; then
    for name in build "tests of the kernels" "tests of the engine" benchmarks "GRPO steps"; do skip "$name" "$why"; done
elif ! part build 80 bash -c build; then
    for name in "tests of the kernels" "tests of the engine" benchmarks "GRPO steps"; do skip "$name" "the build failed"; done
else
    venv=$scratch/venv/bin/python
    # pytest's start file is called, not `python -m pytest`: the latter puts the repository's root on the path.
    run_pytest=("$venv" -c 'import sys, pytest; sys.path[:] = [p for p in sys.path if p]; sys.exit(pytest.main())')
    run_pytest+=(-m gpu -q -p no:cacheprovider --durations=5)
    [ -n "$(missing "$venv" xdist)" ] || run_pytest+=(-n 4)  # compiling and fp64 on the host take longer than the GPU
    why=$(missing "$venv" pytest hypothesis)
    if [ -n "$why" ]; then skip "tests of the kernels" "$why"; else
        mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests/kernels)
        part "tests of the kernels" 110 "${run_pytest[@]}" "${files[@]}" tests/gpu/kernels
    fi
    engine=(pytest tyro rich transformers tokenizers safetensors filelock tensorboard matplotlib pynvml gguf)
    why=$(missing "$venv" "${engine[@]}")
    if [ -n "$why" ]; then skip "tests of the engine" "$why"; else
        part "tests of the engine" 55 "${run_pytest[@]}" tests/gpu/engine tests/parallel
    fi
    part benchmarks 130 "$venv" benchmarks/kernel_library.py --quick --out "$results"
    if [ -n "$why" ]; then skip "GRPO steps" "$why"; else
        part "GRPO steps" 65 "$venv" benchmarks/grpo_step.py --quick --scratch "$scratch" --out "$results"
    fi
fi

"$python" - "$scratch/parts" "$results/summary.json" $SECONDS <<'END' | tee -a "$results/gpu.log"
import json, pathlib, sys
parts = []
for line in pathlib.Path(sys.argv[1]).read_text().splitlines():
    name, code, seconds, why = line.split("\t")
    status = "skipped" if code == "" else "passed" if code == "0" else "failed"
    parts.append({"part": name, "status": status, "exit_code": int(code) if code else None, "seconds": int(seconds), "why": why})
pathlib.Path(sys.argv[2]).write_text(json.dumps({"parts": parts, "seconds": int(sys.argv[3])}, indent=2) + "\n")
print(f"\n{'part':<22} {'exit code':>9} {'seconds':>8}")
for part in parts:
    code = "skipped" if part["exit_code"] is None else part["exit_code"]
    print(f"{part['part']:<22} {code:>9} {part['seconds']:>8}  {part['why']}".rstrip())
print(f"{'in all':<22} {'':>9} {sys.argv[3]:>8}")
END
! cut -f2 "$scratch/parts" | grep -qvE '^0?$'
