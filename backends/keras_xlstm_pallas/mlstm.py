"""The chunkwise mLSTM in Pallas for JAX: the kernel of the op, its gradient, what rules it out.

On a TPU, forward is one pass over the chunks. Backward, a pass computes the memories at the starts
of chunks again, and another goes from the last chunk to the first. On a GPU such passes compute
memories and their gradients only, and all else is computed of all chunks at once (`mlstm_gpu.py`).
What is small, (B, S, NH), is left to XLA. Under sharding by batch and by head each device computes
its own part (`partition.py`).

What it runs on says `target.py`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_xlstm.ops.mlstm import MAX_EXPONENT, NEVER
from keras_xlstm.ops.mlstm_chunks import stabilizers, to_the_maximum
from keras_xlstm_pallas import xla
from keras_xlstm_pallas.mlstm_chunk import Numbers
from keras_xlstm_pallas.partition import by_batch_and_head
from keras_xlstm_pallas.target import Target, why_not_here

DTYPES = {"tpu": ("float32", "bfloat16"), "gpu": ("float32", "bfloat16", "float16")}
OVER = -8192.0  # a logarithm of which exp is 0, and of which a chunk's sum is exact
BLOCK = 2**16  # elements of a block of keys of a TPU
WIDEST = 1024  # keys on a TPU
MEMORY = 2**17  # elements of the memory of a program: of float32, seven in 16 MiB of a TPU's VMEM


def why_not(q, k, v, *args, **kwargs):
    if reason := why_not_here(q):
        return reason
    target = Target.of()
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if not set(dtypes) <= set(DTYPES[target.platform]):
        return f"needs one of {DTYPES[target.platform]} on a {target.platform}, received {dtypes}"
    if target.platform == "tpu" and q.shape[-1] > WIDEST:
        return f"needs keys of at most {WIDEST} on a tpu, received {q.shape[-1]}"


def how(q, k, v, *args, chunk_size, eps):
    return str(Plan.of(q, k, v, chunk_size, eps))


class Plan(NamedTuple):
    """How a call is cut, and computed."""

    target: Target
    L: int
    T: int  # of DHHV, of a program
    TK: int  # of DHQK
    DHQK: int  # filled up with zeros, as DHHV
    DHHV: int
    numbers: Numbers
    kept: jnp.dtype  # of memories at the starts of chunks
    eps: float

    @classmethod
    def of(cls, q, k, v, chunk_size, eps):
        target, dtype = Target.of(), jnp.result_type(q, k, v)
        S, DHQK, DHHV = q.shape[1], q.shape[-1], v.shape[-1]
        scale, on_gpu = 1 / math.sqrt(DHQK), target.platform == "gpu"
        # Weights and memories may be too small for float16. Beside it, tensor cores multiply them
        # as tf32, which holds float16 exactly.
        exact = dtype == jnp.float32
        computed = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
        numbers = Numbers(jnp.dtype(computed), precision, scale)
        if on_gpu:
            most = 32 if exact else 64  # steps, and columns, for which there are registers
            L = min(power_of_two(chunk_size or most), power_of_two(S), most)
            T, TK = (32 if x <= 32 else most for x in (DHHV, DHQK))
        else:
            L = min(-(-x // 16) * 16 for x in (chunk_size or 128, S, 128, BLOCK // DHQK // 16 * 16))
            T, TK = min(DHHV, MEMORY // DHQK // 128 * 128), DHQK
        DHQK, DHHV = -(-DHQK // TK) * TK, -(-DHHV // T) * T
        return cls(target, L, T, TK, DHQK, DHHV, numbers, jnp.dtype(computed), eps)

    def __str__(self):
        return f"{self.target}, in chunks of {self.L} steps, by {self.T} values a program"

    @property
    def interpreted(self):
        return self.target.interpreted

    @property
    def warps(self):
        """Of a program on a GPU. Those of float32, whose factors are in registers, spill with 8."""
        return 4 if self.numbers.precision == lax.Precision.HIGHEST else 8

    def cut(self, function, inputs, outputs):
        function = functools.partial(function, self)
        return by_batch_and_head(function, inputs, outputs, self.target.platform == "tpu")

    @property
    def kernels(self):
        from keras_xlstm_pallas import mlstm_gpu, mlstm_tpu

        return mlstm_tpu if self.target.platform == "tpu" else mlstm_gpu


def power_of_two(x):
    return max(1 << (x - 1).bit_length(), 16)


def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    plan = Plan.of(q, k, v, chunk_size, eps)
    dtype = jnp.result_type(q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    h, *state = _compiled(plan, q, k, v, i, log_f, s, *state)
    return h, tuple(state)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(plan, *inputs):
    return _mlstm(plan, *inputs)[0]


SEQUENCES = "B S NH DHQK", "B S NH DHQK", "B S NH DHHV", *["B S NH"] * 3
STATE = "B NH DHQK DHHV", "B NH DHQK", "B NH"
INPUTS, OUTPUTS, KEPT = (*SEQUENCES, *STATE), ("B S NH DHHV", *STATE), ("B S NH",) * 3


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlstm(plan, *inputs):
    """The outputs; and what `_gradients` wants, of which there is no gradient."""
    out = plan.cut(forward, INPUTS, OUTPUTS + KEPT)(*inputs)
    return out[:4], out[4:]


def _mlstm_forward(plan, *inputs):
    outputs, kept = _mlstm(plan, *inputs)  # itself, since it may be differentiated twice
    return (outputs, kept), (inputs, outputs, kept)


def _mlstm_backward(plan, residuals, d):
    return _gradients(plan, *residuals, d[0])


_mlstm.defvjp(_mlstm_forward, _mlstm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(plan, inputs, outputs, kept, d_outputs):
    cut = plan.cut(backward, INPUTS + OUTPUTS + KEPT + OUTPUTS, INPUTS)
    return cut(*inputs, *outputs, *kept, *d_outputs)


def _gradients_forward(plan, inputs, outputs, kept, d_outputs):
    gradients = _gradients(plan, inputs, outputs, kept, d_outputs)
    return gradients, (inputs, outputs, kept, d_outputs)


def _gradients_backward(plan, residuals, dd):
    """A second derivative is that of XLA's form, in which outputs are no inputs."""
    inputs, outputs, kept, d_outputs = residuals

    def first(inputs, d_outputs):
        *tensors, C, n, m = inputs
        state = C, n, m

        def plain(*inputs):
            *sequences, C, n, m = inputs
            h, state = xla.mlstm(*sequences, (C, n, m), chunk_size=plan.L, eps=plan.eps)
            return h, *state

        return jax.vjp(plain, *tensors, *state)[1](d_outputs)

    d_inputs, dd_outputs = jax.vjp(first, inputs, d_outputs)[1](dd)
    return d_inputs, *jax.tree.map(jnp.zeros_like, (outputs, kept)), dd_outputs


_gradients.defvjp(_gradients_forward, _gradients_backward)


def forward(plan, q, k, v, i, log_f, s, C, n, m):
    """Of what a device has: see `_mlstm`. Kept are, of each step, n^T q, m_t and m_(t-1)."""
    m_t, before = stabilizers(log_f, s, m)
    floor = floor_of(m_t)
    weights = weigh(plan, i, log_f, m_t, before, floor, jnp.zeros_like(floor))
    h, nq, C_end, n_end = plan.kernels.outputs(
        plan, *filled(plan, q, k, v), weights, *filled_state(plan, C, n)
    )
    h, C_end, n_end = of_shape(h, v), of_shape(C_end, C), of_shape(n_end[0], n)
    return h, C_end, n_end, m_t[:, -1], from_chunks(nq[0], m_t), m_t, before


def backward(plan, q, k, v, i, log_f, s, C, n, m, h, C_end, n_end, m_end, nq, m_t, before, *d):
    """Of what a device has: see `_gradients`."""
    dh, dC, dn, dm = d
    # h = num / (max(|nq|, exp(-m)) + eps)
    floor = floor_of(m_t)
    r = 1 / (jnp.maximum(jnp.abs(nq), floor) + plan.eps)
    along = r * jnp.sum(dh.astype(jnp.float32) * h.astype(jnp.float32), -1)
    d_nq = jnp.where(jnp.abs(nq) > floor, -along * jnp.sign(nq), 0.0)
    weights = weigh(plan, i, log_f, m_t, before, r, d_nq)

    q_, k_, v_ = filled(plan, q, k, v)
    _, _, dh = filled(plan, q, k, dh)
    starts = plan.kernels.starts(plan, k_, v_, weights, *filled_state(plan, C, n))
    dq, dk, dv, di, dlog_f, dC_start, dn_start = plan.kernels.gradients(
        plan, q_, k_, v_, dh, weights, *starts, *filled_state(plan, dC, dn)
    )
    dq, dk, di, dlog_f, dn_start = (x.sum(0) for x in (dq, dk, di, dlog_f, dn_start))
    dq, dk, dv = (of_shape(x, y).astype(y.dtype) for x, y in ((dq, q), (dk, k), (dv, v)))
    di, dlog_f = from_chunks(di, i), from_chunks(dlog_f, i)
    dC_start, dn_start = of_shape(dC_start, C), of_shape(dn_start, n)

    # A stabilizer only scales, so its gradient cancels, but for eps and the last state. What is
    # left flows to the step that set the maximum.
    dm = dm - jnp.sum(dC * C_end, (-1, -2)) - jnp.sum(dn * n_end, -1)
    ds, more, _ = to_the_maximum(-plan.eps * along, dm, before, log_f, s)
    dlog_f = dlog_f + more
    dm = dlog_f[:, 0]  # m comes in as log_f + m of the first step, and nowhere else
    return dq, dk, dv, di, dlog_f, ds, dC_start, dn_start, dm


def floor_of(m_t):
    return jnp.exp(jnp.minimum(-m_t, MAX_EXPONENT))


def weigh(plan, i, log_f, m_t, before, r, e):
    """What gates weigh, of arrays (B, S, NH): the fields of `mlstm_chunk.Weights`.

    Returns:
        (B, NH, chunks, 8, L). Steps beyond the last write nothing and leave all as it is.
    """

    def in_chunks(x, **beyond):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % plan.L), (0, 0)), **beyond)
        return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1, plan.L)

    i, r, e = in_chunks(i, constant_values=NEVER), in_chunks(r), in_chunks(e)
    sums = [jnp.cumsum(x, -1) for x in parts(jnp.maximum(in_chunks(log_f), OVER))]
    m_t = in_chunks(m_t, mode="edge")
    m_start, m_end = in_chunks(before)[..., :1], m_t[..., -1:]

    def difference(x, y):
        return x[0] - y[0], x[1] - y[1]

    def sum_of(x, y):
        return (x[0] + y[0]) + (x[1] + y[1])

    row, column = difference(sums, parts(m_t)), difference(parts(i), sums)
    from_start = jnp.exp(sum_of(row, parts(m_start)))
    end = difference([x[..., -1:] for x in sums], parts(m_end))
    to_end = jnp.exp(sum_of(column, end))
    log_scale = math.log(plan.numbers.scale)
    rows = row[0], row[1] + log_scale, from_start, to_end, r, e, *column
    return jnp.stack(rows, 3)


def parts(x):
    """A multiple of 1/16, of which float32 holds sums exactly up to 2^20, and a small rest."""
    multiple = jnp.floor(x * 16 + 0.5) / 16
    return multiple, x - multiple


def from_chunks(x, like):
    """(B, NH, chunks, L) -> (B, S, NH)."""
    x = jnp.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)
    return x[:, : like.shape[1]]


def filled(plan, q, k, v):
    """Up to the widths of the plan."""
    return to_width(q, plan.DHQK), to_width(k, plan.DHQK), to_width(v, plan.DHHV)


def filled_state(plan, C, n):
    C = to_width(jnp.swapaxes(to_width(C, plan.DHHV), -1, -2), plan.DHQK)
    return jnp.swapaxes(C, -1, -2), to_width(n, plan.DHQK)


def to_width(x, width):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def of_shape(x, like):
    return lax.slice(x, (0,) * x.ndim, like.shape)
