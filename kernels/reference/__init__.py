"""The plain-torch twin of every op: any device, fp64-capable, and the only place where the loss math is written.

Shape suffixes: T tokens, S sequences, N rows, H hidden, V vocabulary. Arguments are already checked by the public ops.
"""
