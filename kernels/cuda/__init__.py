"""How the ops call csrc/cuda: pointers, sizes and strides out of tensors, one function of the C interface each."""
