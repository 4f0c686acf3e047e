"""Installs the top-level folders as `strop.<folder>` and compiles csrc/ where the machine has the compilers for it.

The two native libraries have a plain C interface and are loaded with ctypes, so g++ and nvcc are called directly: building
needs neither torch nor Python headers, and one wheel serves every supported Python. A library that is not built is no error,
because every kernel has a plain-torch reference; `strop/kernels/_native/build.txt` says what was built and why not.

Environment:
  CXX=g++-13            another g++ than the one on PATH; clang++ brings an OpenMP of its own, libomp, and with it a second
                        pool of threads beside torch's, of which torch.set_num_threads knows nothing
  CUDA_HOME=/opt/cuda   where nvcc is, if not on PATH
  STROP_FORCE_CUDA=1    compile csrc/cuda although this machine has no GPU (to build a wheel for one that has)
  STROP_BUILD=strict    a compile error fails the installation
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOMS = ("engine", "kernels", "launch")
SOURCES = {"strop_cpu": ("csrc/cpu", "*.cpp"), "strop_cuda": ("csrc/cuda", "*.cu")}

# No -march=native: a wheel must run on older CPUs, so the sources choose AVX2 / AVX-512 at run time. No -ffast-math: the
# kernels rely on inf and NaN.
CXX_FLAGS = "-std=c++17 -O3 -fno-math-errno -fopenmp -fPIC -shared -Wall"
# sm_90a is Hopper with its wgmma and TMA instructions. The static CUDA runtime keeps the library independent of torch's.
NVCC_FLAGS = "-std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -cudart static -Xcompiler -fPIC -shared --threads 4"


def compiler_for(library: str) -> tuple[list[str], str]:
    """(command line without sources, "") to build `library`, or ([], the reason why it is not built here)."""
    if library == "strop_cpu":
        command = shlex.split(os.environ.get("CXX") or "g++")
        if shutil.which(command[0]) is None:
            return [], f"no C++ compiler ({command[0]}) on PATH: install g++, or name yours with CXX, and install strop again"
        return [*command, *CXX_FLAGS.split()], ""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("STROP_FORCE_CUDA") != "1":
        return [], "this machine has no NVIDIA GPU (STROP_FORCE_CUDA=1 builds it all the same)"
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    if nvcc is None:
        return [], f"no nvcc on PATH or in {cuda_home}/bin: install the CUDA toolkit, or set CUDA_HOME, and install strop again"
    return [nvcc, *NVCC_FLAGS.split()], ""


def compile_library(library: str, sources: list[str], target: Path) -> str:
    """Compile `sources` into `target`; returns the line for build.txt. Raises CompileError only under STROP_BUILD=strict."""
    command, reason = compiler_for(library)
    if not command:
        return f"{library}: not built: {reason}"
    done = subprocess.run([*command, *sources, "-o", str(target)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(shlex.join(done.args), done.stdout, sep="\n", flush=True)
    if done.returncode == 0:
        return f"{library}: built with {command[0]} from {len(sources)} files"
    target.unlink(missing_ok=True)
    failure = f"{library}: not built: {command[0]} failed with exit status {done.returncode}:\n{done.stdout.rstrip()}"
    if os.environ.get("STROP_BUILD") == "strict":
        raise CompileError(f"{failure}\n(STROP_BUILD=strict makes this an error)")
    return f"{failure}\nstrop is installed without it and uses the plain-torch reference: same results, slower."


class BuildNative(build_ext):
    """`build_ext` for plain shared libraries, in the wheel or (editable install) in the source folder kernels/_native."""

    def run(self) -> None:
        mode = os.environ.get("STROP_BUILD", "")
        if mode not in ("", "strict"):
            raise OptionError(f"STROP_BUILD={mode}: only 'strict' (a compile error fails the installation) has a meaning")
        folder = Path("kernels/_native") if self.editable_mode or self.inplace else self._wheel_folder()
        shutil.rmtree(folder, ignore_errors=True)  # never leave the library of an older source in place
        folder.mkdir(parents=True)
        lines = [compile_library(e.name, e.sources, folder / f"{e.name}.so") for e in self.extensions]
        report = "".join(f"{line}\n" for line in lines)
        (folder / "build.txt").write_text(report)
        print(report, end="", flush=True)

    def _wheel_folder(self) -> Path:
        return Path(self.build_lib, "strop/kernels/_native")

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in self._wheel_folder().glob("*"))

    def get_output_mapping(self) -> dict[str, str]:
        built = Path("kernels/_native").glob("*") if self.editable_mode or self.inplace else ()
        return {str(self._wheel_folder() / path.name): str(path) for path in built}


class AnyPythonWheel(bdist_wheel):
    """The libraries are bound to the platform, not to a Python version or its ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def native_libraries() -> list[Extension]:
    found = {name: sorted(Path(folder).glob(pattern)) for name, (folder, pattern) in SOURCES.items()}
    headers = sorted(str(path) for suffix in ("h", "hpp", "cuh") for path in Path("csrc").rglob(f"*.{suffix}"))
    return [Extension(name, [str(p) for p in paths], depends=headers) for name, paths in found.items() if paths]


packages = [f"strop.{name}" for room in ROOMS for name in (room, *(f"{room}.{p}" for p in find_packages(room)))]
setup(
    packages=packages,
    package_dir={f"strop.{room}": room for room in ROOMS},
    ext_modules=native_libraries(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
