"""Calls of csrc/cpu: argument order and tensor layout in one place, everything else is C++."""

import torch

from .. import native


def call_parallel(function: str, *arguments: object) -> None:
    """native.call for what csrc/cpu/threads.h shares out, on as many threads as torch takes in the calling thread.

    torch tells OpenMP that number in each thread by itself, when it first needs it there; asking for it makes sure that it has
    been told. Otherwise torch.set_num_threads(1) would not count in a new thread that has only called these kernels.
    """
    torch.get_num_threads()
    native.call(function, *arguments)
