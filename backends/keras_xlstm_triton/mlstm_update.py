"""One step of the mLSTM in Triton: the kernel of `mlstm_decode.py`.

What it costs is reading and writing C, so each part of C goes through the chip once: the read is
from the new C, before that is forgotten.

    a program: one head, one tile of DHHV
                   TILE of DHHV
                  ┌────┐
             ROWS │ C' │ = a C + b k v^T        num += q C',  nq += q n'
          of DHQK ├────┤
                  │ C  │ on its way, while the rows above are computed
                  └────┘
"""

# mypy: ignore-errors
import triton
import triton.language as tl

MAX_EXPONENT = tl.constexpr(88.0)


@triton.jit
def update(
    q,  # (B, NH, DHQK), as k; v (B, NH, DHHV)
    k,
    v,
    q_batch,  # strides, of batch and head
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    i,  # (B, NH), as log_f and s
    log_f,
    s,
    C,  # (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH)
    n,
    m,
    h,  # (B, NH, DHHV)
    C_new,
    n_new,
    m_new,
    NH,
    scale,
    eps,
    DHQK: tl.constexpr,
    DHHV: tl.constexpr,
    ROWS: tl.constexpr,  # powers of two
    TILE: tl.constexpr,
):
    tiles: tl.constexpr = (DHHV + TILE - 1) // TILE
    tile = tl.program_id(0) % tiles
    at = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = at // NH, at % NH
    q += batch * q_batch + head * q_head
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    n += at * DHQK
    n_new += at * DHQK
    row, column = tl.arange(0, ROWS), tile * TILE + tl.arange(0, TILE)
    in_tile = column < DHHV
    memory = at * (DHQK * DHHV) + row[:, None] * DHHV + column[None, :]
    C_x = tl.load(C + memory, mask=(row < DHQK)[:, None] & in_tile[None, :], other=0.0)

    m_old = tl.load(log_f + at) + tl.load(m + at)
    m_t = tl.maximum(m_old, tl.load(s + at))
    over, write = tl.exp(m_old - m_t), tl.exp(tl.load(i + at) - m_t)
    v_x = tl.load(v + column, mask=in_tile, other=0.0).to(tl.float32)
    num, nq = tl.zeros((ROWS, TILE), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, DHQK, ROWS):
        happens, more = row < DHQK - start, row < DHQK - start - ROWS
        mask, mask_next = happens[:, None] & in_tile[None, :], more[:, None] & in_tile[None, :]
        C_next = tl.load(C + memory + (start + ROWS) * DHHV, mask=mask_next, other=0.0)
        q_x = tl.load(q + start + row, mask=happens, other=0.0).to(tl.float32)
        written = tl.load(k + start + row, mask=happens, other=0.0).to(tl.float32) * write
        n_x = tl.load(n + start + row, mask=happens, other=0.0) * over + written
        C_x = C_x * over + written[:, None] * v_x[None, :]
        num += q_x[:, None] * C_x
        nq += q_x * n_x
        tl.store(C_new + memory + start * DHHV, C_x, mask=mask)
        if tile == 0:
            tl.store(n_new + start + row, n_x, mask=happens)
        C_x = C_next
    floor = tl.exp(tl.minimum(-m_t, MAX_EXPONENT))
    h_x = tl.sum(num, 0) * scale / (tl.maximum(tl.abs(tl.sum(nq, 0)) * scale, floor) + eps)
    tl.store(h + at * DHHV + column, h_x.to(h.dtype.element_ty), mask=in_tile)
    if tile == 0:
        tl.store(m_new + at, m_t)
