"""The sLSTM in Pallas: the kernels of a walk through the steps, forward and back, in one launch.

Mathematics and names are those of `keras_xlstm/ops/slstm.py`, and m of a fresh state is NEVER, as
in `keras_xlstm/ops/slstm_loop.py`.

A program has one head and a tile of rows, and walks through all steps. The recurrent weights stay
on the chip, and so does what one step hands to the next. `slstm_tpu.py` and `slstm_gpu.py` say how
such a program reads and writes: it is their `Part`. Columns, DH of them, come in pieces, which are
multiplied one by one; arrays are indexed by what stands between rows and columns:

    x, raw, d_raw         [step, gate]       h, dh_out  [step]       before  [step, one of c n m]
    start, end and their  [one of h c n m]   bias       [gate]       scale   []
    gradients                                R          [gate]       flags   [step]

The walk back computes a step's factors again, from raw and the state before the step. To keep them
would be 10 numbers an element to write and to read, where raw and state are 7; and since they wait
for no other step, there is time for them while the product with R is under way.
"""

import jax.numpy as jnp
from jax import lax

from keras_xlstm.ops.mlstm import NEVER

GATES = range(4)
FRESH = 0.0, 0.0, 0.0, NEVER  # h, c, n, m
HAPPENS, CLEARED, MASKED = 0, 1, 2  # flags of a step. A cleared one happens, of a fresh state.


def step(raw, c, n, m):
    """h, c, n, m after a step, and what its gradient wants of it."""
    i, f, z, o = raw
    from_before = log_sigmoid(f) + m
    m = jnp.maximum(i, from_before)
    F, I = jnp.exp(from_before - m), jnp.exp(i - m)
    tanh_z, sigmoid_o = jnp.tanh(z), sigmoid(o)
    c, n = F * c + I * tanh_z, F * n + I
    return (sigmoid_o * c / n, c, n, m), (F, I, tanh_z, sigmoid_o, i >= from_before)


def step_back(raw, c, n, m, dh, dc, dn, dm):
    """The gradients of raw, and of c, n, m before a step, from those of h, c, n, m after it.

    A stabilizer only scales: dm is what the last state's m gets, on the way back to the step that
    set it.
    """
    (h, _, n_new, _), (F, I, tanh_z, sigmoid_o, set_by_i) = step(raw, c, n, m)
    dc, dn = dc + dh * sigmoid_o / n_new, dn - dh * h / n_new
    dm_i = jnp.where(set_by_i, dm, 0.0)
    dm = dm - dm_i
    di = (dc * tanh_z + dn) * I + dm_i
    df = ((dc * c + dn * n) * F + dm) * sigmoid(-raw[1])
    dz = dc * I * (1 - tanh_z * tanh_z)
    return (di, df, dz, dh * h * (1 - sigmoid_o)), (dc * F, dn * F, dm)


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def log_sigmoid(x):
    return jnp.minimum(x, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(x)))


def forward(part, x, R, bias, start, flags, scale, h_out, end, raw_out=None, before_out=None):
    """What the gradient wants is written where there is a place for it."""
    bias = [[part.read_row(bias, gate, p) for gate in GATES] for p in part.pieces]
    scale = scale if scale is None else [part.read(scale, p) for p in part.pieces]

    def body(t, before):
        state, after = before, []
        if flags is not None:
            flag = part.read_flag(flags, t)
            state = [select(flag == CLEARED, FRESH, values) for values in state]
        h = [values[0] for values in state]
        if scale is not None:
            h = [x * y for x, y in zip(h, scale, strict=True)]
        for p in part.pieces:
            cnm = state[p][1:]
            raw = [
                part.read(x, t, gate, p) + bias[p][gate] + product(part, h, R, gate, p)
                for gate in GATES
            ]
            new, _ = step(raw, *cnm)
            if flags is not None:
                new = select(flag == MASKED, before[p], new)
            part.write(h_out, new[0], t, p)
            if raw_out is not None:
                for gate in GATES:
                    part.write(raw_out, raw[gate], t, gate, p)
                for k in range(3):
                    part.write(before_out, cnm[k], t, k, p)
            after.append(new)
        return after

    part.walk(body, start, end)


def backward(part, raw, before, R_transposed, dh_out, later, flags, scale, d_raw_out, earlier):
    """From the gradients of h, c, n, m after the last step to those before the first."""
    scale = scale if scale is None else [part.read(scale, p) for p in part.pieces]

    def body(t, later):
        later = [
            (dh + part.read(dh_out, t, p), *others)
            for p, (dh, *others) in zip(part.pieces, later, strict=True)
        ]
        if flags is not None:
            flag = part.read_flag(flags, t)
        d_raw, d_cnm = [], []
        for p in part.pieces:
            raw_p = [part.read(raw, t, gate, p) for gate in GATES]
            cnm = [part.read(before, t, k, p) for k in range(3)]
            of_raw, of_cnm = step_back(raw_p, *cnm, *later[p])
            if flags is not None:
                of_raw = select(flag == MASKED, (0.0,) * 4, of_raw)
            for gate in GATES:
                part.write(d_raw_out, of_raw[gate], t, gate, p)
            d_raw.append(of_raw)
            d_cnm.append(of_cnm)
        earlier = []
        for p in part.pieces:
            dh = 0.0
            for gate in GATES:
                dh += product(part, [x[gate] for x in d_raw], R_transposed, gate, p)
            if scale is not None:
                dh = dh * scale[p]
            if flags is not None:
                dh = jnp.where(flag == CLEARED, 0.0, dh)
            new = dh, *d_cnm[p]
            if flags is not None:
                new = select(flag == MASKED, later[p], new)
            earlier.append(new)
        return earlier

    part.walk(body, later, earlier, back=True)


def product(part, left, weights, gate, p):
    """Piece p of `left @ weights[gate]`, of factors in the dtype of the weights."""
    # By default a TPU would round float32 to bfloat16, and a GPU to tf32.
    precision = part.exact if weights.dtype == jnp.float32 else lax.Precision.DEFAULT
    total = 0.0
    for k in part.pieces:
        total += jnp.dot(
            left[k].astype(weights.dtype),
            part.read_weights(weights, gate, k, p),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
    return total


def select(where, chosen, others):
    return tuple(jnp.where(where, x, y) for x, y in zip(chosen, others, strict=True))
