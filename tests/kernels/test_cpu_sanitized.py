"""The tests of csrc/cpu once more, in a process whose library stops at the first access or behaviour C++ doesn't allow."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "csrc/cpu").glob("*.cpp"))
COMPILE = ("g++ -std=c++17 -O1 -g -fno-math-errno -fno-omit-frame-pointer -fopenmp -fPIC -shared "
           "-fsanitize=address,undefined -fno-sanitize-recover=all")  # fmt: skip
PLUGIN = """
from pathlib import Path
from strop.kernels import native
native.FOLDER = Path({folder!r})
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_no_access_outside_the_tensors_and_no_undefined_behaviour(tmp_path):
    subprocess.run([*shlex.split(COMPILE), *map(str, SOURCES), "-o", str(tmp_path / "strop_cpu.so")], check=True)
    (tmp_path / "sanitized_library.py").write_text(PLUGIN.format(folder=str(tmp_path)))
    runtimes = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    environment = {
        **os.environ, "PYTHONPATH": str(tmp_path), "LD_PRELOAD": ":".join(runtimes), "OMP_NUM_THREADS": "1",
        # torch and Python keep memory to the end, and torch's libraries don't agree on some inline functions.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
    tests = [str(HERE / f"test_cpu_{part}.py") for part in ("logit_rows", "policy_loss")]
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    options = ["-p", "sanitized_library", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options, *tests], env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_sanitizer_would_tell(tmp_path):
    """A read one element behind a tensor ends the process: the test above can fail."""
    source = tmp_path / "outside.cpp"
    source.write_text('extern "C" float behind(const float *x, long n) { return x[n]; }\n')
    subprocess.run([*shlex.split(COMPILE), str(source), "-o", str(tmp_path / "outside.so")], check=True)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    script = (
        f"import ctypes, torch; f = ctypes.CDLL({str(tmp_path / 'outside.so')!r}).behind; x = torch.zeros(64); "
        "print(f(ctypes.c_void_p(x.data_ptr()), ctypes.c_long(64)))"
    )
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-2000:]
