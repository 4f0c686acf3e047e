"""Calls of csrc/cpu: argument order and tensor layout in one place, everything else is C++."""
