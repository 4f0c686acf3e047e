"""Adapters that make other trainers use strop.kernels: `trl` (TRL's GRPOTrainer) and `verl` (an actor worker's functions).

Opt-in: nothing of strop imports this package, and an adapter changes only the objects it is given, never a class or module of
its peer. Import the one you want; without its peer it says how to install it.
"""
