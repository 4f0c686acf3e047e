"""Compiles every Triton kernel of strop for sm_90a, without a GPU: `python aot_compile.py [FILE ...]` prints one JSON line a
kernel (of kernels/triton/FILE.py only, where given).

A script, so that another environment's interpreter can run it, for another version of triton.
"""

import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import strop.kernels.triton as shipped

PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def modules(chosen: list[str]) -> list:
    names = chosen or [info.name for info in pkgutil.iter_modules(shipped.__path__)]
    return [importlib.import_module(f"{shipped.__name__}.{name}") for name in names]


def forgotten(module) -> list[str]:
    """Kernels defined in `module` that its aot_cases() leaves out."""
    kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")
               and value.fn.__module__ == module.__name__}  # fmt: skip
    return sorted(kernels - {case.kernel.__name__ for case in module.aot_cases()}) if kernels else []


def source_of(case) -> ASTSource:
    """The case as ASTSource takes it: types apart from constants, and which values are multiples of 16."""
    names = list(inspect.signature(case.kernel.fn).parameters)
    unknown = set(case.arguments) ^ set(names)
    assert not unknown, f"{case.kernel.__name__} {case.label}: arguments that differ from the kernel's: {sorted(unknown)}"
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value, parameter = case.arguments[name], case.kernel.params[index]
        assert not parameter.do_not_specialize or value in ("i32", "i64", "fp32"), f"{name} is never compiled for {value}"
        if isinstance(value, str) and not parameter.is_constexpr:
            signature[name] = value.removesuffix(":16")
            if value.endswith(":16"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name], constants[(index,)] = "constexpr", value
    return ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)


def inspect_case(case) -> dict:
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(source_of(case), target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(PTXAS), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        return int(re.search(pattern, report)[1])

    return {
        "kernel": case.kernel.__name__, "label": case.label, "warps": case.num_warps,
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"), "shared": compiled.metadata.shared,
        "f64": ".f64" in ptx, "wgmma": "wgmma" in ptx, "needs_wgmma": case.multiplies_matrices,
        "vectorised": bool(re.search(r"(ld|st)\.global[\w.:]*\.v[24]", ptx)), "triton": triton.__version__,
    }  # fmt: skip


def main() -> None:
    for module in modules(sys.argv[1:]):
        for name in forgotten(module):
            print(json.dumps({"kernel": name, "missing": f"not in aot_cases() of {module.__name__}"}))
        for case in getattr(module, "aot_cases", list)():
            print(json.dumps(inspect_case(case)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
