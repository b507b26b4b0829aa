"""The sLSTM in Triton: two kernels, whose whole loop over the steps is one launch each.

Mathematics and names are those of `keras_xlstm/ops/slstm.py`; the gradient is that of
`keras_xlstm/ops/slstm_loop.py`. A program has one head and ROWS rows of the batch, and no other
program needs what it computes. A step multiplies

    forward    h (ROWS, DH) with R (DH, 4, DH)             gives what h adds to i, f, z, o
    backward   d_raw (ROWS, 4, DH) with R^T (4, DH, DH)    gives the gradient of h

Where a head is narrow enough (ON_CHIP), R stays in shared memory for the whole loop, the state in
registers, and the gates of the next step are read ahead. Else a step goes through the head in
tiles, and

    R       is read anew each step, SLICE rows of it at a time; it comes from caches
    states  of the step before are read from where they were written

            K = DH, or 4 DH backward              TILE of DH
           ┌───────┐                             ┌────┐
      ROWS │ SLICE │ h, or d_raw           SLICE │    │ of R, for each gate
           └───────┘                             └────┘

The backward loop computes each step again, from the states before it, which the forward loop kept,
and its pre-activations, which `slstm.py` multiplies for all steps at once. In their place the loop
leaves their gradients. Rows and columns that pad a tile hold zeros.

A state that is fresh, n = 0, has m = NEVER in `states`: so `max(i, log_f + m)` is i there. All is
float32 but the operands of products.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=("B", "S"))
def forward(
    gates,  # (B, S, 4, NH, DH)
    gates_batch,  # strides; that of the last axis is 1
    gates_step,
    gates_gate,
    gates_head,
    R,  # (NH, DH, 4, DH)
    bias,  # (4, NH, DH)
    scale,  # (B, NH, DH)
    happens,  # (B, S), int8, as cleared
    cleared,
    states,  # (4, B, S + 1, NH, DH): h, c, n, m; those before step t at t
    KIND,  # the stride from h to c, and so on
    B,
    S,
    NH,
    DH: tl.constexpr,
    ROWS: tl.constexpr,  # powers of two
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,  # loads that are under way, in loops that only read
    ON_CHIP: tl.constexpr,
    MASK: tl.constexpr,
    RESET: tl.constexpr,
    SCALE: tl.constexpr,
    DOT: tl.constexpr,  # the dtype of operands
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(B, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_batch = row < B
    STEP = NH * DH
    gates += (row * gates_batch)[:, None] + head * gates_head
    states += (row * (S + 1) * STEP)[:, None] + head * DH
    scale += (row * STEP)[:, None] + head * DH
    R += head * DH * 4 * DH
    bias += head * DH
    if ON_CHIP:
        e, all = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
        at_all = in_batch[:, None] & (all < DH)
        h, c, n, m = load_four(states + all, KIND, at_all)
        by = tl.load(scale + all, mask=at_all, other=0.0) if SCALE else 1.0
        R_i, R_f, R_z, R_o = load_four(R + e * (4 * DH) + all, DH, (e < DH) & (all < DH))
        b_i, b_f, b_z, b_o = load_four(bias + all, STEP, all < DH)
    OUTER: tl.constexpr = STAGES if ON_CHIP else 1

    for number in tl.range(S, num_stages=OUTER):
        t = tl.cast(number, tl.int64)
        step = row * S + t
        if RESET:
            clear = (tl.load(cleared + step, mask=in_batch, other=0) != 0)[:, None]
        for start in tl.range(0, DH, TILE):
            d = start + tl.arange(0, TILE)[None, :]
            at = in_batch[:, None] & (d < DH)
            i, f, z, o = load_four(gates + t * gates_step + d, gates_gate, at)
            if not ON_CHIP:
                b_i, b_f, b_z, b_o = load_four(bias + d, STEP, d < DH)
            i, f = i.to(tl.float32) + b_i, f.to(tl.float32) + b_f
            z, o = z.to(tl.float32) + b_z, o.to(tl.float32) + b_o
            before = states + t * STEP
            if ON_CHIP:
                x = tl.where(clear, 0.0, h) if RESET else h
                x = (x * by).to(DOT)
                i = tl.dot(x, R_i, i, input_precision=PRECISION)
                f = tl.dot(x, R_f, f, input_precision=PRECISION)
                z = tl.dot(x, R_z, z, input_precision=PRECISION)
                o = tl.dot(x, R_o, o, input_precision=PRECISION)
            else:
                for k in tl.range(0, DH, SLICE, num_stages=STAGES):
                    along = k + tl.arange(0, SLICE)[None, :]
                    at_x = in_batch[:, None] & (along < DH)
                    x = tl.load(before + along, mask=at_x, other=0.0)
                    if RESET:
                        x = tl.where(clear, 0.0, x)
                    if SCALE:
                        x *= tl.load(scale + along, mask=at_x, other=0.0)
                    x = x.to(DOT)
                    e = k + tl.arange(0, SLICE)[:, None]
                    R_i, R_f, R_z, R_o = load_four(R + e * (4 * DH) + d, DH, (e < DH) & (d < DH))
                    i = tl.dot(x, R_i, i, input_precision=PRECISION)
                    f = tl.dot(x, R_f, f, input_precision=PRECISION)
                    z = tl.dot(x, R_z, z, input_precision=PRECISION)
                    o = tl.dot(x, R_o, o, input_precision=PRECISION)
                h, c, n, m = load_four(before + d, KIND, at)
            if RESET:
                c, n = tl.where(clear, 0.0, c), tl.where(clear, 0.0, n)
                m = tl.where(clear, NEVER, m)
            F, I, tanh_z, _, m_new = cell(i, f, z, m)
            c_new, n_new = F * c + I * tanh_z, F * n + I
            h_new = tl.sigmoid(o) * c_new / n_new
            if MASK:
                on = (tl.load(happens + step, mask=in_batch, other=0) != 0)[:, None]
                h_new, c_new = tl.where(on, h_new, h), tl.where(on, c_new, c)
                n_new, m_new = tl.where(on, n_new, n), tl.where(on, m_new, m)
            if ON_CHIP:
                h, c, n, m = h_new, c_new, n_new, m_new
            store_four(before + STEP + d, KIND, h_new, c_new, n_new, m_new, at)
        if not ON_CHIP:
            tl.debug_barrier()  # the next step reads what all threads wrote


@triton.jit(do_not_specialize=("B", "S"))
def backward(
    raw,  # (NH, B, S, 4, DH): pre-activations, and then their gradients
    R,  # (NH, DH, 4, DH)
    scale,  # (B, NH, DH)
    happens,  # (B, S), int8, as cleared
    cleared,
    states,  # (4, B, S + 1, NH, DH)
    KIND,
    dh_out,  # (B, S, NH, DH)
    dh_batch,  # strides; that of the last axis is 1
    dh_step,
    dh_head,
    d_state,  # (4, B, NH, DH): after the last step, and then before the first
    B,
    S,
    NH,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SLICE: tl.constexpr,
    STAGES: tl.constexpr,
    ON_CHIP: tl.constexpr,
    MASK: tl.constexpr,
    RESET: tl.constexpr,
    SCALE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(B, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_batch = row < B
    STEP = NH * DH
    raw += (head * B * S + row * S)[:, None] * (4 * DH)
    states += (row * (S + 1) * STEP)[:, None] + head * DH
    dh_out += (row * dh_batch)[:, None] + head * dh_head
    d_state += (row * STEP)[:, None] + head * DH
    scale += (row * STEP)[:, None] + head * DH
    R += head * DH * 4 * DH
    if ON_CHIP:
        e, all = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
        at_all = in_batch[:, None] & (all < DH)
        dh, dc, dn, dm = load_four(d_state + all, B * STEP, at_all)
        by = tl.load(scale + all, mask=at_all, other=0.0) if SCALE else 1.0
        R_i, R_f, R_z, R_o = load_four(R + all * (4 * DH) + e, DH, (e < DH) & (all < DH))
    OUTER: tl.constexpr = STAGES if ON_CHIP else 1
    SLICES: tl.constexpr = (DH + SLICE - 1) // SLICE

    for number in tl.range(S, num_stages=OUTER):
        t = tl.cast(S - 1 - number, tl.int64)
        step = row * S + t
        if RESET:
            clear = (tl.load(cleared + step, mask=in_batch, other=0) != 0)[:, None]
        if MASK:
            on = (tl.load(happens + step, mask=in_batch, other=0) != 0)[:, None]
        for start in tl.range(0, DH, TILE):
            d = start + tl.arange(0, TILE)[None, :]
            at = in_batch[:, None] & (d < DH)
            raw_at = raw + t * (4 * DH) + d
            i, f, z, o = load_four(raw_at, DH, at)
            _, c, n, m = load_four(states + t * STEP + d, KIND, at)
            if not ON_CHIP:
                dh, dc, dn, dm = load_four(d_state + d, B * STEP, at)
            dh += tl.load(dh_out + t * dh_step + d, mask=at, other=0.0)
            if RESET:
                c, n = tl.where(clear, 0.0, c), tl.where(clear, 0.0, n)
                m = tl.where(clear, NEVER, m)

            F, I, tanh_z, set_by_i, _ = cell(i, f, z, m)
            c_new, n_new, sigmoid_o = F * c + I * tanh_z, F * n + I, tl.sigmoid(o)
            h_new = sigmoid_o * c_new / n_new
            dc_new, dn_new = dc + dh * sigmoid_o / n_new, dn - dh * h_new / n_new
            dm_i = tl.where(set_by_i, dm, 0.0)
            di = (dc_new * tanh_z + dn_new) * I + dm_i
            df = ((dc_new * c + dn_new * n) * F + (dm - dm_i)) * tl.sigmoid(-f)
            dz = dc_new * I * (1.0 - tanh_z * tanh_z)
            do = dh * h_new * (1.0 - sigmoid_o)
            dc_new, dn_new, dm_new, dh_rest = dc_new * F, dn_new * F, dm - dm_i, tl.zeros_like(dh)
            if MASK:
                di, df = tl.where(on, di, 0.0), tl.where(on, df, 0.0)
                dz, do = tl.where(on, dz, 0.0), tl.where(on, do, 0.0)
                dc_new, dn_new = tl.where(on, dc_new, dc), tl.where(on, dn_new, dn)
                dm_new, dh_rest = tl.where(on, dm_new, dm), tl.where(on, 0.0, dh)
            store_four(raw_at, DH, di, df, dz, do, at)
            if ON_CHIP:
                dh = tl.zeros_like(dh)
                dh = tl.dot(di.to(DOT), R_i, dh, input_precision=PRECISION)
                dh = tl.dot(df.to(DOT), R_f, dh, input_precision=PRECISION)
                dh = tl.dot(dz.to(DOT), R_z, dh, input_precision=PRECISION)
                dh = tl.dot(do.to(DOT), R_o, dh, input_precision=PRECISION) * by
                dh = dh_rest + (tl.where(clear, 0.0, dh) if RESET else dh)
                dc, dn, dm = dc_new, dn_new, dm_new
            else:
                store_four(d_state + d, B * STEP, dh_rest, dc_new, dn_new, dm_new, at)
        if not ON_CHIP:
            tl.debug_barrier()
            for start in tl.range(0, DH, TILE):
                d = start + tl.arange(0, TILE)[None, :]
                at = in_batch[:, None] & (d < DH)
                dh = tl.zeros((ROWS, TILE), tl.float32)
                for part in tl.range(4 * SLICES, num_stages=STAGES):
                    gate, k = part // SLICES, part % SLICES * SLICE
                    along = k + tl.arange(0, SLICE)[None, :]
                    at_x = in_batch[:, None] & (along < DH)
                    x = tl.load(raw + (t * 4 + gate) * DH + along, mask=at_x, other=0.0)
                    e = k + tl.arange(0, SLICE)[:, None]
                    at_R = (e < DH) & (d < DH)
                    R_x = tl.load(R + d * (4 * DH) + gate * DH + e, mask=at_R, other=0.0)
                    dh = tl.dot(x.to(DOT), R_x, dh, input_precision=PRECISION)
                if SCALE:
                    dh *= tl.load(scale + d, mask=at, other=0.0)
                if RESET:
                    dh = tl.where(clear, 0.0, dh)
                tl.store(d_state + d, tl.load(d_state + d, mask=at, other=0.0) + dh, mask=at)
            tl.debug_barrier()
    if ON_CHIP:
        store_four(d_state + all, B * STEP, dh, dc, dn, dm, at_all)


@triton.jit
def cell(i, f, z, m):
    """F, I, tanh(z), whether i sets the stabilizer, and the stabilizer."""
    passing = tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f))) + m
    m_new = tl.maximum(i, passing)
    # Near 0, sigmoid(2 z) would lose what z is.
    series = z * (15.0 + z * z) / (15.0 + 6.0 * (z * z))
    tanh_z = tl.where(tl.abs(z) < 0.2, series, 2.0 / (1.0 + tl.exp(-2.0 * z)) - 1.0)
    return tl.exp(passing - m_new), tl.exp(i - m_new), tanh_z, i >= passing, m_new


@triton.jit
def load_four(x, BETWEEN, mask):
    """i, f, z, o, or h, c, n, m."""
    one, two = tl.load(x, mask=mask, other=0.0), tl.load(x + BETWEEN, mask=mask, other=0.0)
    x += 2 * BETWEEN
    return one, two, tl.load(x, mask=mask, other=0.0), tl.load(x + BETWEEN, mask=mask, other=0.0)


@triton.jit
def store_four(x, BETWEEN, one, two, three, four, mask):
    tl.store(x, one, mask=mask)
    tl.store(x + BETWEEN, two, mask=mask)
    tl.store(x + 2 * BETWEEN, three, mask=mask)
    tl.store(x + 3 * BETWEEN, four, mask=mask)
