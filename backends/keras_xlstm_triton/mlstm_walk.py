"""The chunkwise mLSTM in Triton: one kernel, whose walk over the chunks gives h, dq, dk or dv.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. Of a head, each of the four is a
weighted sum of vectors c_y, over the steps y before x (h, dq) or after it (dk, dv),

    out_x = sum_y P_xy ((a_x . b_y) r + e) c_y

    walk   out   a    b    c    r, e of the step t that reads     gives, beside out
    h      num   q    k    v    1, 0                              h, n^T q, the last C and n
    dq     dq    dh   v    k    1 / denominator_t, d(n^T q)_t     a part of dlog_f
    dk     dk    v    dh   q    the same                          the rest, di, the first dC and dn
    dv     dv    k    q    dh   1 / denominator_t, 0

where P_tj = exp(decay(t, j) + i_j - m_t) / sqrt(DHQK) is what step t reads of what step j wrote.
Steps of one chunk meet in an L x L matrix. All others meet through a memory M, the sum of weight_y
b_y c_y^T, which a walk carries from chunk to chunk: C, or its gradient dC. The sums over e are the
same with another memory, n or dn, of b_y = 1. In h, n is what C would hold of v = 1.

    a program: one head, one segment of the sequence, one tile of c
                                             TILE of the width of c
             FULL width of a, b             ┌────┐
            ┌──────────────┐ a, b of        │    │ M, float32, in
          L │              │ one chunk      ├────┤ slices
            └──────────────┘                └────┘
                             L x L: P, a b^T
                                            ┌────┐
                                          L │    │ c, out
                                            └────┘

So every output has one writer, and nothing is added in an order that may change. Where there are
too few heads and tiles to fill the device, the sequence is cut into segments: a first pass (OUT
False) gives what each adds to the memory, `chain` in `mlstm_steps.py` what each starts from.

M is multiplied slice by slice. ON_CHIP, its slices stay in registers for the whole walk, and the
loop over them is unrolled. Otherwise they lie in device memory, of which the cache holds what a
program comes back to at the next chunk: the loop is short whatever the width, and registers are
left for operands.

What the gates weigh is computed once, by `weigh` in the same file. On chip all is float32 but the
operands of products.
"""

# mypy: ignore-errors
import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)


@triton.jit
def walk(
    a,  # (B, S, NH, FULL_WIDTH), as b; c, d and out (B, S, NH, TILE_WIDTH)
    b,
    c,
    d,  # in dq and dk, whose gates have gradients: q and k
    out,
    a_batch,  # strides, of batch, step and head
    a_step,
    a_head,
    b_batch,
    b_step,
    b_head,
    c_batch,
    c_step,
    c_head,
    d_batch,
    d_step,
    d_head,
    weights,  # (B, NH, chunks, 7, L), of `weigh` in `mlstm_steps.py`
    over,  # (B, NH, chunks), of the same
    reads,  # (B, NH, chunks, 2, L): r and e above, of `through_denominator`
    nq,  # (B, NH, chunks, L)
    di,  # (tiles, B, NH, chunks, L), as dlog_f: of each tile of DHQK its part
    dlog_f,
    C_in,  # (B, NH, segments, DHQK, DHHV), before the segment; n_in (B, NH, segments, DHQK)
    n_in,
    C_out,  # after it: of the last one to be walked, or without OUT of each
    n_out,
    over_out,  # (B, NH, segments), without OUT: what a segment leaves of the memory before it
    C_kept,  # (B, NH, chunks, DHQK, DHHV), at the starts of chunks: from dq to dk
    n_kept,
    M_work,  # (B, NH, segments, DHQK, DHHV), if not ON_CHIP: M
    n_work,  # (programs, DHQK): n, in h, of which each tile has its own
    S,
    NH,
    segments,
    chunks,
    chunks_each,  # of a segment
    eps,
    FULL_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    SLICE: tl.constexpr,  # powers of two
    TILE: tl.constexpr,
    ON_CHIP: tl.constexpr,
    L: tl.constexpr,
    WALK: tl.constexpr,
    OUT: tl.constexpr,
    DOT: tl.constexpr,  # the dtype of operands that are computed
    PRECISION: tl.constexpr,
):
    BACK: tl.constexpr = (WALK == "dk") or (WALK == "dv")
    BY_KEY: tl.constexpr = (WALK == "dq") or (WALK == "dk")  # c is of DHQK, a and b of DHHV
    DHQK: tl.constexpr = TILE_WIDTH if BY_KEY else FULL_WIDTH
    SIZE: tl.constexpr = FULL_WIDTH * TILE_WIDTH

    tiles: tl.constexpr = (TILE_WIDTH + TILE - 1) // TILE
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    segment, row_of_heads = row % segments, row // segments
    batch, head = row_of_heads // NH, row_of_heads % NH
    a += batch * a_batch + head * a_head
    b += batch * b_batch + head * b_head
    c += batch * c_batch + head * c_head
    d += batch * d_batch + head * d_head
    out += (batch * S * NH + head) * TILE_WIDTH
    tile_of_gates = tile * (tl.num_programs(0) // tiles // segments * chunks).to(tl.int64)

    SLICES: tl.constexpr = (FULL_WIDTH + SLICE - 1) // SLICE
    step, full = tl.arange(0, L), tl.arange(0, SLICE)
    part = tile * TILE + tl.arange(0, TILE)
    in_part = part < TILE_WIDTH
    if BY_KEY:
        memory, FULL_STEP = full[:, None] + part[None, :] * FULL_WIDTH, 1
    else:
        memory, FULL_STEP = full[:, None] * TILE_WIDTH + part[None, :], TILE_WIDTH
    one = (tl.arange(0, 16) == 0).to(tl.float32)[None, :]  # n, in h: a column, of 16 for products
    C_in += row * SIZE
    M_work += row * SIZE
    n_in += row * DHQK
    n_work += tl.program_id(0).to(tl.int64) * DHQK
    M, n = (), ()
    for x in (tl.static_range if ON_CHIP else tl.range)(SLICES):
        in_full = full < FULL_WIDTH - x * SLICE
        in_memory = in_full[:, None] & in_part[None, :]
        if OUT:
            M_first = tl.load(C_in + x * SLICE * FULL_STEP + memory, mask=in_memory, other=0.0)
        else:
            M_first = tl.zeros((SLICE, TILE), tl.float32)
        if WALK == "h":
            n_first = tl.load(n_in + x * SLICE + full, mask=in_full, other=0.0)
        if ON_CHIP:
            M = M + (M_first,)
            if WALK == "h":
                n = n + (n_first[:, None] * one,)
        else:
            tl.store(M_work + x * SLICE * FULL_STEP + memory, M_first, mask=in_memory)
            if WALK == "h":
                tl.store(n_work + x * SLICE + full, n_first, mask=in_full)
    if BY_KEY:
        n = tl.zeros((TILE,), tl.float32)
        if OUT:
            n = tl.load(n_in + part, mask=in_part, other=0.0)
    over_all = 1.0

    count = tl.minimum(chunks_each, chunks - segment * chunks_each)
    # Addresses that are the same for all chunks would fill the registers.
    for number in tl.range(count, disable_licm=True):
        chunk = segment * chunks_each + (count - 1 - number if BACK else number)
        start, at = chunk * L, row_of_heads * chunks + chunk
        happens = step < S - start
        at_part = happens[:, None] & in_part[None, :]
        c_y = tl.load(
            c + start * c_step + (step[:, None] * c_step + part[None, :]), mask=at_part, other=0.0
        )
        # Steps beyond the last write nothing.
        over_chunk = tl.load(over + at)
        w = weights + at * (7 * L) + step
        from_start, to_end = tl.load(w + 4 * L), tl.load(w + 5 * L)
        if (WALK == "dq" and OUT) or BACK:
            r = tl.load(reads + at * (2 * L) + step)
        if (WALK == "dq" and OUT) or WALK == "dk":
            e = tl.load(reads + at * (2 * L) + L + step)
        if BACK:
            read, write = to_end, from_start * r
        else:
            read, write = from_start, to_end

        # The width of a, b, slice by slice: what the chunk reads of the memory and itself, and what
        # it writes.
        weighted = (c_y.to(tl.float32) * write[:, None]).to(DOT)
        inner = tl.zeros((L, L), tl.float32)
        from_memory, from_n = tl.zeros((L, TILE), tl.float32), tl.zeros((L, 16), tl.float32)
        across = 0.0
        M_next, n_next = (), ()
        if not ON_CHIP:
            from_n = tl.zeros((L,), tl.float32)
            tl.debug_barrier()  # what another thread wrote
        for x in (tl.static_range if ON_CHIP else tl.range)(SLICES):
            in_full = full < FULL_WIDTH - x * SLICE
            in_memory = in_full[:, None] & in_part[None, :]
            if ON_CHIP:
                M_x = M[x]
            else:
                M_at = M_work + x * SLICE * FULL_STEP + memory
                M_x = tl.load(M_at, mask=in_memory, other=0.0)
            at_full = happens[:, None] & in_full[None, :]
            b_at = step[:, None] * b_step + full[None, :]
            b_y = tl.load(b + start * b_step + x * SLICE + b_at, mask=at_full, other=0.0)
            if OUT:
                a_at = step[:, None] * a_step + full[None, :]
                a_x = tl.load(a + start * a_step + x * SLICE + a_at, mask=at_full, other=0.0)
                inner = tl.dot(a_x, tl.trans(b_y), inner, input_precision=PRECISION)
                a_x = a_x.to(DOT)
                from_memory = tl.dot(a_x, M_x.to(DOT), from_memory, input_precision=PRECISION)
                if BY_KEY:
                    C_at = C_kept + at * SIZE + x * SLICE * FULL_STEP + memory
                    if WALK == "dq":
                        tl.store(C_at, M_x.to(C_kept.dtype.element_ty), mask=in_memory)
                    else:
                        C = tl.load(C_at, mask=in_memory, other=0.0).to(tl.float32)
                        across += tl.sum(C * M_x)
            M_new = tl.dot(
                tl.trans(b_y).to(DOT), weighted, M_x * over_chunk, input_precision=PRECISION
            )
            if ON_CHIP:
                M_next = M_next + (M_new,)
            else:
                tl.store(M_at, M_new, mask=in_memory)
            if WALK == "h":
                if ON_CHIP:
                    n_x, write_n = n[x], (write[:, None] * one).to(DOT)
                    from_n = tl.dot(a_x, n_x.to(DOT), from_n, input_precision=PRECISION)
                    b_n = tl.trans(b_y).to(DOT)
                    n_new = tl.dot(b_n, write_n, n_x * over_chunk, input_precision=PRECISION)
                    n_next = n_next + (n_new,)
                else:
                    n_at = n_work + x * SLICE + full
                    n_x = tl.load(n_at, mask=in_full, other=0.0)
                    from_n += tl.sum(a_x * n_x[None, :], 1)
                    n_new = n_x * over_chunk + tl.sum(b_y.to(tl.float32) * write[:, None], 0)
                    tl.store(n_at, n_new, mask=in_full)
        if ON_CHIP:
            M = M_next

        if OUT:
            w_x, w_y = (w + 2 * L, w) if BACK else (w, w + 2 * L)
            log_P = tl.load(w_x)[:, None] + tl.load(w_y)[None, :]
            log_P += tl.load(w_x + L)[:, None] + tl.load(w_y + L)[None, :]
            meets = step[:, None] <= step[None, :] if BACK else step[:, None] >= step[None, :]
            P = tl.exp(tl.where(meets, log_P, NEVER))
            if WALK == "h":
                inner *= P
                if ON_CHIP:
                    from_n = tl.sum(from_n, 1)
                nq_t = tl.sum(inner, 1) + from_n * read
            elif WALK == "dq":
                inner = (inner * r[:, None] + e[:, None]) * P
            elif WALK == "dk":
                inner = (inner * r[None, :] + e[None, :]) * P
            else:
                inner *= r[None, :] * P

            # A gate at l is part of what lies between steps j < l and t >= l: inside the chunk,
            # from its start, to its end, or across. No sum holds other terms, to be taken away
            # again: they would leave their rounding errors.
            if BY_KEY:
                before = step[:, None] < step[None, :]  # [j, l]
                gate_at = (tile_of_gates + at) * L + step
                d_x = tl.load(
                    d + start * d_step + (step[:, None] * d_step + part[None, :]),
                    mask=at_part,
                    other=0.0,
                )
            if WALK == "dq":
                d_inside = tl.dot(d_x, tl.trans(c_y), input_precision=PRECISION) * inner
                passing = tl.dot(d_inside.to(DOT), before.to(DOT), input_precision=PRECISION)
                d_gate = tl.sum(tl.where(meets, passing, 0.0), 0)  # [t, l]: t >= l
            out_x = tl.dot(inner.to(DOT), c_y.to(DOT), input_precision=PRECISION)
            if WALK == "h":
                out_x += from_memory * read[:, None]
                out_x /= (tl.maximum(tl.abs(nq_t), tl.load(w + 6 * L)) + eps)[:, None]
                if tile == 0:
                    tl.store(nq + at * L + step, nq_t)
            elif WALK == "dq":
                from_memory = from_memory * (read * r)[:, None] + (read * e)[:, None] * n[None, :]
                out_x += from_memory
            elif WALK == "dk":
                from_memory = (from_memory + n[None, :]) * read[:, None]
                out_x += from_memory
            else:
                out_x += from_memory * read[:, None]
            out_at = out + start * (NH * TILE_WIDTH)
            out_at += step[:, None] * (NH * TILE_WIDTH) + part[None, :]
            tl.store(out_at, out_x.to(out.dtype.element_ty), mask=at_part)

            if BY_KEY:
                d_memory = tl.sum(from_memory * d_x.to(tl.float32), 1)
                n_at = n_kept + at * DHQK + part
            if WALK == "dq":
                tl.store(n_at, n, mask=in_part)
                d_gate += tl.sum(tl.where(meets, d_memory[:, None], 0.0), 0)
                tl.store(dlog_f + gate_at, d_gate)
            elif WALK == "dk":
                across += tl.sum(tl.load(n_at, mask=in_part, other=0.0) * n, 0)
                d_gate = tl.sum(tl.where(before, d_memory[:, None], 0.0), 0) + over_chunk * across
                tl.store(dlog_f + gate_at, d_gate + tl.load(dlog_f + gate_at))
                tl.store(di + gate_at, tl.sum(out_x * d_x.to(tl.float32), 1))

        if WALK == "h" and ON_CHIP:
            n = n_next
        elif WALK == "dq":
            n = n * over_chunk + tl.sum(c_y.to(tl.float32) * write[:, None], 0)
        elif WALK == "dk":
            n = n * over_chunk + tl.sum(c_y.to(tl.float32) * (from_start * e)[:, None], 0)
        over_all *= over_chunk

    if OUT:
        end, is_end = row_of_heads, segment == (0 if BACK else segments - 1)
    else:
        end, is_end = row, segment >= 0
        if tile == 0:
            tl.store(over_out + row, over_all)
    if (WALK == "h" or WALK == "dk" or not OUT) and is_end:
        C_out += end * SIZE
        n_out += end * DHQK
        if not ON_CHIP:
            tl.debug_barrier()
        for x in (tl.static_range if ON_CHIP else tl.range)(SLICES):
            in_full = full < FULL_WIDTH - x * SLICE
            in_memory = in_full[:, None] & in_part[None, :]
            if ON_CHIP:
                M_last = M[x]
            else:
                M_last = tl.load(M_work + x * SLICE * FULL_STEP + memory, mask=in_memory)
            tl.store(C_out + x * SLICE * FULL_STEP + memory, M_last, mask=in_memory)
            if WALK == "h" and tile == 0:
                if ON_CHIP:
                    n_last = tl.sum(n[x], 1)
                else:
                    n_last = tl.load(n_work + x * SLICE + full, mask=in_full)
                tl.store(n_out + x * SLICE + full, n_last, mask=in_full)
        if BY_KEY:
            tl.store(n_out + part, n, mask=in_part)
