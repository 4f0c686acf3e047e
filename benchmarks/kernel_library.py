"""Every op of strop.kernels beside plain torch, torch.compile and the libraries that have it: one table.

    OMP_NUM_THREADS=2 python benchmarks/kernel_library.py [--quick] [--out FOLDER]

The same as each benchmarks/<op>.py, in one process: the box's own rates are measured once. An op that fails is a line of
the table and the exit code.
"""

import importlib

from comparison import command_line, markdown, report, run
from rates import Rates

OPS = (
    "linear_logprob", "linear_policy_loss", "logprob", "policy_loss", "group_advantage", "rms_norm", "swiglu", "rope",
    "moe_permute", "quantize_fp8", "multi_tensor_copy",
)  # fmt: skip


def main() -> None:
    device, quick, folder = command_line(__doc__)
    rates = Rates.measure(device)
    print(f"{rates}\n{markdown(())}", flush=True)
    lines, data, failures = [], {}, 0
    for op in OPS:
        own, data[op], failed = run(op, importlib.import_module(op).comparisons(device, quick), device, quick, rates)
        lines += own
        failures += failed
    report("kernels", "strop.kernels against its peers", lines, data, rates, folder)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
