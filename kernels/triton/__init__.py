"""The Triton form of every op, tuned for Hopper, with its tile sizes shipped (no autotuning).

Conventions: arithmetic in fp32, converted right after the load (Triton's interpreter computes garbage in bf16); int64 row
offsets; any strides; no host synchronisation. A kernel's name ends in `_kernel`; each file's `aot_cases()` lists its kernels
as they are launched, so that a machine without a GPU can compile and inspect them (tests/kernels/test_aot.py).
"""
