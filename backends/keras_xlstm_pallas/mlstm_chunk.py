"""One chunk of the mLSTM, forward and backward, as functions of values: the mathematics.

`mlstm_tpu.py` loads a chunk, calls these, and stores what they return. `mlstm_gpu.py` computes the
same tile by tile, in kernels of its own, with `Weights` and `Numbers` from here. Names are those of
`keras_xlstm/ops/mlstm.py`; a chunk has L steps:

    q, k  (L, DHQK)    v, h  (L, DHHV)    C  (DHQK, DHHV)    n  (1, DHQK)

Of a head's values it may be a tile: then h, dv, C and dC are those of the tile, and dq, dk and the
gradients of the gates are sums over tiles. What comes by n belongs to one of the tiles; to the
others its gradient, and that of n^T q, are given as 0.

What the gates weigh is computed before, by `weigh` in `mlstm.py`. Gates, stabilizers, memories and
sums are float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_xlstm.ops.mlstm import NEVER


class Weights(NamedTuple):
    """Of the steps of a chunk, (L, 1), but for `column` and `column_rest`, (1, L).

    exp(row_t + column_j) is what step t reads of what step j wrote, / sqrt(DHQK). Logarithms come
    in two parts, a multiple of 1/16 and a rest, so that small ones survive beside large ones.
    """

    row: jax.Array
    row_rest: jax.Array
    from_start: jax.Array  # what is left at step t of the memory before the chunk
    to_end: jax.Array  # what is left after the chunk of what step j wrote
    r: jax.Array  # forward: exp(-m_t); backward: 1 / denominator_t
    e: jax.Array  # backward: the gradient of n^T q_t
    column: jax.Array
    column_rest: jax.Array

    def inside(self):
        """(L, L), at [t, j] what step t reads of what step j wrote; 0 where j > t."""
        logarithms = (self.row + self.column) + (self.row_rest + self.column_rest)
        t, j = steps(len(self.row))
        return jnp.exp(jnp.where(t >= j, logarithms, NEVER))

    def over_chunk(self):
        """(1, 1), what is left after the chunk of the memory before it."""
        step = lax.broadcasted_iota(jnp.int32, self.from_start.shape, 0)
        last = jnp.where(step == len(self.from_start) - 1, self.from_start, 0.0)
        return jnp.sum(last, 0, keepdims=True)


class Numbers(NamedTuple):
    """How products are computed."""

    dtype: jnp.dtype  # of operands that are computed
    precision: lax.Precision
    scale: float  # 1 / sqrt(DHQK)

    def product(self, a, b, a_axis=1, b_axis=0):
        """The sum over an axis of a and one of b."""
        if a.dtype != b.dtype or a.dtype == jnp.float32:
            a, b = a.astype(self.dtype), b.astype(self.dtype)
        axes = ((a_axis,), (b_axis,)), ((), ())
        return lax.dot_general(
            a, b, axes, precision=self.precision, preferred_element_type=jnp.float32
        )


def forward(q, k, v, C, n, w, numbers, eps):
    """h; n^T q (1, L), as the denominator has it; and the next C and n."""
    read = w.from_start * numbers.scale
    inner = numbers.product(q, k, 1, 1) * w.inside()
    num = numbers.product(inner, v) + read * numbers.product(q, C)
    nq = row_sums(inner) + read * row_sums(floats(q) * n)
    h = num / (jnp.maximum(jnp.abs(nq), w.r) + eps)
    return h, as_row(nq), *next_memory(k, v, C, n, w, numbers)


def next_memory(k, v, C, n, w, numbers):
    """C and n after the chunk."""
    written = floats(k) * w.to_end
    C = w.over_chunk() * C + numbers.product(written, v, 0, 0)
    return C, w.over_chunk() * n + column_sums(written)


def backward(q, k, v, dh, C, n, dC, dn, w, numbers):
    """dq, dk, dv; di and dlog_f (1, L); dC and dn before the chunk, of C and n there.

    dC and dn are given after the chunk. Stabilizers are constants here.
    """
    P, read = w.inside(), w.from_start * numbers.scale
    inner = numbers.product(q, k, 1, 1) * P
    d_inner = numbers.product(dh, v, 1, 1) * w.r + w.e
    d_inside = inner * d_inner  # of logarithms
    d_qk = d_inner * P

    from_start = numbers.product(dh, C, 1, 1) * (read * w.r) + (read * w.e) * n
    to_end = (numbers.product(v, dC, 1, 1) + dn) * w.to_end
    dq = numbers.product(d_qk, k) + from_start
    dk = numbers.product(d_qk, q, 0, 0) + to_end
    dv = numbers.product(inner * w.r, dh, 0, 0) + numbers.product(floats(k) * w.to_end, dC)

    # A gate at l is part of what lies between steps j < l and t >= l: inside the chunk, from its
    # start, to its end, or across. No sum holds other terms, to be taken away again: they would
    # leave their rounding errors.
    t, l = steps(len(q))
    d_from_start, d_to_end = row_sums(from_start * floats(q)), row_sums(to_end * floats(k))
    passing = numbers.product(d_inside, (t < l).astype(jnp.float32))  # [t, l]: over j < l
    across = w.over_chunk() * (total(dC * C) + total(dn * n))
    dlog_f = column_sums(jnp.where(t >= l, passing + d_from_start, d_to_end)) + across
    di = column_sums(d_inside) + as_row(d_to_end)

    dC = w.over_chunk() * dC + numbers.product(floats(q) * (read * w.r), dh, 0, 0)
    dn = w.over_chunk() * dn + column_sums(floats(q) * (read * w.e))
    return dq, dk, dv, di, dlog_f, dC, dn


def steps(L):
    """(L, L), the numbers of the row and of the column."""
    return (lax.broadcasted_iota(jnp.int32, (L, L), axis) for axis in (0, 1))


def as_row(x):
    """(L, 1) -> (1, L)."""
    t, l = steps(len(x))
    return column_sums(jnp.where(t == l, x, 0.0))


def floats(x):
    return x.astype(jnp.float32)


def row_sums(x):
    return jnp.sum(x, 1, keepdims=True)


def column_sums(x):
    return jnp.sum(x, 0, keepdims=True)


def total(x):
    return row_sums(column_sums(x))
