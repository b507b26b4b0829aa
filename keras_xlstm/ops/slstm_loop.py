"""The sLSTM with its gradient written out, for frameworks that compile it.

Mathematics and names are those of `keras_xlstm/ops/slstm.py`. Only what a step needs of the step
before it stays in the loops. The backward loop multiplies with factors that were computed for all
steps at once; the gradient of the recurrent kernel is one product after it.

Heads come first in the loops, (NH, B, DH), so that memory mixing is one batched product. Everything
is computed in float32. A state that is fresh, n = 0, has its stabilizer at NEVER inside the loop:
so `max(i, lf + m)` is i there.

A stabilizer only scales, so its gradient cancels, but for that of the last state, which flows to
the step that set the maximum.

The backend brings the loop, as `jax.lax.scan` does it: `scan(body, state, inputs, reverse=False)`.
"""

from keras import ops

from keras_xlstm.ops.mlstm import NEVER
from keras_xlstm.ops.products import einsum


def forward(scan, gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale, keep=True):
    """Returns (h, state), and with `keep` what `backward` wants besides the inputs."""
    R, scale = flatten_gates(recurrent_kernel), heads_first(recurrent_scale, 1.0)
    x = ops.transpose(ops.cast(gates, "float32") + bias, (1, 3, 0, 2, 4))

    def body(state, inputs):
        x, happens, cleared = inputs
        before = state
        if reset is not None:
            fresh = (0.0, 0.0, 0.0, NEVER)
            state = tuple(ops.where(cleared, y, z) for y, z in zip(fresh, state, strict=True))
        h, c, n, m = state
        raw = x + ops.reshape(einsum("nbd,nde->nbe", h * scale, R), ops.shape(x))
        i, f, z, o = (raw[:, :, gate] for gate in range(4))
        from_before = ops.log_sigmoid(f) + m
        m = ops.maximum(i, from_before)
        F, I = ops.exp(from_before - m), ops.exp(i - m)
        c, n = F * c + I * ops.tanh(z), F * n + I
        state = ops.sigmoid(o) * c / n, c, n, m
        if mask is not None:
            state = tuple(ops.where(happens, y, z) for y, z in zip(state, before, strict=True))
        return state, (*state, raw) if keep else state[:1]

    m_start = heads_first(state[3])
    end, (h, *kept) = scan(body, start_of_loop(state), (x, each_step(mask), each_step(reset)))
    h_end, c_end, n_end, m_end = end
    m_end = ops.where(n_end == 0, m_start, m_end)
    end = tuple(ops.swapaxes(x, 0, 1) for x in (h_end, c_end, n_end, m_end))
    return (ops.transpose(h, (2, 0, 1, 3)), end), (h, *kept)


def backward(scan, inputs, kept, dh_out, d_end):
    """The gradients of gates, recurrent_kernel, bias, the state, and recurrent_scale if given."""
    gates, recurrent_kernel, _, state, mask, reset, recurrent_scale = inputs
    h, c, n, m, raw = kept  # (S, NH, B, DH); raw (S, NH, B, 4, DH)
    R, scale = flatten_gates(recurrent_kernel), heads_first(recurrent_scale, 1.0)
    start, happens, cleared = start_of_loop(state), each_step(mask), each_step(reset)
    h_before, c_before, n_before, m_before = (
        ops.concatenate([first[None], x[:-1]], 0) for first, x in zip(start, kept, strict=False)
    )
    if reset is not None:
        h_before = ops.where(cleared, 0.0, h_before)
        m_before = ops.where(cleared, NEVER, m_before)  # and so F = 0

    # What the gradients of a step are multiples of.
    i, f, z, o = (raw[:, :, :, gate] for gate in range(4))
    F, I = ops.exp(ops.log_sigmoid(f) + m_before - m), ops.exp(i - m)
    tanh_z, sigmoid_o = ops.tanh(z), ops.sigmoid(o)
    factors = dict(
        h_c=sigmoid_o / n,
        h_n=-h / n,
        h_o=h * (1 - sigmoid_o),
        c_z=I * (1 - tanh_z**2),
        c_i=I * tanh_z,
        n_i=I,
        c_f=F * c_before,
        n_f=F * n_before,
        f=ops.sigmoid(-f),
    )
    set_by_i = m == i
    if mask is not None:
        factors = {name: ops.where(happens, x, 0.0) for name, x in factors.items()}
        F, set_by_i = ops.where(happens, F, 1.0), ops.logical_and(happens, set_by_i)

    def body(later, inputs):
        dh, dc, dn, dm = later
        dh_out, F, set_by_i, happens, cleared, by = inputs
        dh = dh + dh_out
        dc, dn = dc + dh * by["h_c"], dn + dh * by["h_n"]
        dm_i = ops.where(set_by_i, dm, 0.0)
        dm = dm - dm_i
        di = dc * by["c_i"] + dn * by["n_i"] + dm_i
        df = (dc * by["c_f"] + dn * by["n_f"] + dm) * by["f"]
        d_raw = ops.stack([di, df, dc * by["c_z"], dh * by["h_o"]], 2)
        flat = ops.reshape(d_raw, (*ops.shape(dh)[:2], -1))
        dh_before = einsum("nbe,nde->nbd", flat, R) * scale
        if reset is not None:
            dh_before = ops.where(cleared, 0.0, dh_before)
        if mask is not None:
            dh_before = ops.where(happens, dh_before, dh)
        return (dh_before, dc * F, dn * F, dm), d_raw

    dh, dc, dn, dm = (heads_first(x) for x in d_end)
    later = dh, dc, dn, dm - dc * c[-1] - dn * n[-1]
    steps = ops.transpose(dh_out, (1, 2, 0, 3)), F, set_by_i, happens, cleared, factors
    (dh, dc, dn, dm), d_raw = scan(body, later, steps, reverse=True)
    _, c_start, n_start, _ = start
    d_start = dh, dc, dn, dm + dc * c_start + dn * n_start

    d_kernel = einsum("snbd,snbge->ndge", h_before * scale, d_raw)
    d_scale = None
    if recurrent_scale is not None:
        dh_scaled = einsum("snbge,ndge->snbd", d_raw, recurrent_kernel)
        d_scale = ops.swapaxes(ops.sum(dh_scaled * h_before, 0), 0, 1)
    return (
        ops.cast(ops.transpose(d_raw, (2, 0, 3, 1, 4)), gates.dtype),
        d_kernel,
        ops.transpose(ops.sum(d_raw, (0, 2)), (1, 0, 2)),
        tuple(ops.swapaxes(x, 0, 1) for x in d_start),
        d_scale,
    )


def heads_first(x, default=None):
    """(B, NH, DH) -> (NH, B, DH), float32."""
    return default if x is None else ops.swapaxes(ops.cast(x, "float32"), 0, 1)


def start_of_loop(state):
    h, c, n, m = (heads_first(x) for x in state)
    return h, c, n, ops.where(n == 0, NEVER, m)


def each_step(flag):
    """(B, S) -> (S, 1, B, 1)."""
    return None if flag is None else ops.swapaxes(flag, 0, 1)[:, None, :, None]


def flatten_gates(recurrent_kernel):
    """(NH, DH, 4, DH) -> (NH, DH, 4 DH)."""
    return ops.reshape(recurrent_kernel, (*recurrent_kernel.shape[:2], -1))
