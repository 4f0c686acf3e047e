"""Elementary functions that triton.language lacks (libdevice's are out of the interpreter's reach), in fp32."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Absolute error 1e-7, which is what a softcap needs; e^2x = inf gives 1."""
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def exp_minus_linear(x):
    """e^x - 1 - x. Near 0 by its series, x^2/2! + x^3/3! + ...: the terms left out are below 4e-8 of the sum."""
    tail = 1.0 + x * (1 / 8)
    tail = 1.0 + x * (1 / 7) * tail
    tail = 1.0 + x * (1 / 6) * tail
    tail = 1.0 + x * (1 / 5) * tail
    tail = 1.0 + x * (1 / 4) * tail
    tail = 1.0 + x * (1 / 3) * tail
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * tail, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 without losing a small x to the 1."""
    return tl.where(tl.abs(x) < 0.5, x + exp_minus_linear(x), tl.exp(x) - 1.0)


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; NaN stays NaN, which min and max on a GPU would drop."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def order_key(x):
    """int32 in the order of the floats, NaN above inf: a maximum of keys keeps a NaN, which one of floats drops on a GPU."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def from_order_key(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
