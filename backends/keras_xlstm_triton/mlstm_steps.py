"""The small kernels around `mlstm_walk.py`: what is needed of each step, and of each segment."""

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)
MAX_EXPONENT = tl.constexpr(88.0)


@triton.jit
def stabilizers(log_f, s, m_in, m, S, NH, BLOCK: tl.constexpr):
    """m_t = max(log_f_t + m_(t-1), s_t), (B, S, NH), of m_in before the first step.

    A program walks one head, in blocks that it scans.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // NH, row % NH
    last, last_rest = parts(tl.load(m_in + row))
    step = tl.arange(0, BLOCK)
    for start in range(0, S, BLOCK):
        t = start + step
        at = (batch * S + t) * NH + head
        f, f_rest = parts(tl.load(log_f + at, mask=t < S, other=0.0))
        offer, offer_rest = parts(tl.load(s + at, mask=t < S, other=NEVER))
        scanned = tl.associative_scan((f, f_rest, offer, offer_rest), 0, later)
        f, f_rest, offer, offer_rest = scanned
        f, f_rest = f + last, f_rest + last_rest
        passes = (f - offer) + (f_rest - offer_rest) > 0
        f, f_rest = tl.where(passes, f, offer), tl.where(passes, f_rest, offer_rest)
        tl.store(m + at, f + f_rest, mask=t < S)
        more, last_rest = parts(tl.sum(tl.where(step == BLOCK - 1, f_rest, 0.0), 0))
        last = tl.sum(tl.where(step == BLOCK - 1, f, 0.0), 0) + more


@triton.jit
def later(f_1, f_rest_1, offer_1, offer_rest_1, f_2, f_rest_2, offer_2, offer_rest_2):
    """One stretch of steps after another: sums of log_f, and stabilizers, in two parts each."""
    passing, passing_rest = offer_1 + f_2, offer_rest_1 + f_rest_2
    passes = (passing - offer_2) + (passing_rest - offer_rest_2) > 0
    offer = tl.where(passes, passing, offer_2)
    return f_1 + f_2, f_rest_1 + f_rest_2, offer, tl.where(passes, passing_rest, offer_rest_2)


@triton.jit
def weigh(i, log_f, m, m_in, weights, over, S, NH, chunks, log_scale, L: tl.constexpr):
    """What the gates of a chunk weigh, without the loss of small logarithms beside large ones.

    Every logarithm comes in two parts: a multiple of 1/16, of which float32 holds sums exactly up
    to 2^20, and a rest, which is small. Written, (B, NH, chunks, 7, L): at 0 and 1 the parts of
    row_t, at 2 and 3 those of column_j, where exp(row_t + column_j) is what step t reads of what
    step j of the same chunk wrote; at 4 what it reads of the memory before the chunk; at 5 what is
    left, after the chunk, of what it wrote; and at 6 exp(-m_t). `over` (B, NH, chunks): what is
    left of the memory before. All but exp(-m_t) is 0 beyond the last step.
    """
    at = tl.program_id(0).to(tl.int64)
    chunk, head, batch = at % chunks, at // chunks % NH, at // chunks // NH
    step = tl.arange(0, L)
    happens = step < S - chunk * L
    t, end = tl.minimum(chunk * L + step, S - 1), tl.minimum(chunk * L + L, S) - 1
    steps = batch * S * NH + head
    m_before = tl.load(m + steps + tl.maximum(chunk * L - 1, 0) * NH)
    m_start, m_start_rest = parts(tl.where(chunk == 0, tl.load(m_in + batch * NH + head), m_before))
    m_end, m_end_rest = parts(tl.load(m + steps + end * NH))
    m_t = tl.load(m + steps + t * NH)
    m_t, m_t_rest = parts(tl.where(happens, m_t, -NEVER))
    i_j = tl.load(i + steps + t * NH)
    i_j, i_j_rest = parts(tl.where(happens, i_j, NEVER))
    f = tl.maximum(tl.load(log_f + steps + t * NH), -8192.0)  # of which exp is 0
    f, f_rest = parts(tl.where(happens, f, 0.0))
    g, g_rest = tl.sum(f, 0), tl.sum(f_rest, 0)
    f, f_rest = tl.cumsum(f, 0), tl.cumsum(f_rest, 0)

    row, row_rest = f - m_t, f_rest - m_t_rest + log_scale
    column, column_rest = i_j - f, i_j_rest - f_rest
    w = weights + at * (7 * L) + step
    tl.store(w, row)
    tl.store(w + L, row_rest)
    tl.store(w + 2 * L, column)
    tl.store(w + 3 * L, column_rest)
    tl.store(w + 4 * L, tl.exp((row + m_start) + (row_rest + m_start_rest)))
    tl.store(w + 5 * L, tl.exp((column + (g - m_end)) + (column_rest + (g_rest - m_end_rest))))
    tl.store(w + 6 * L, tl.exp(tl.minimum(-(m_t + m_t_rest), MAX_EXPONENT)))
    over_chunk = tl.exp((g + (m_start - m_end)) + (g_rest + (m_start_rest - m_end_rest)))
    tl.store(over + at, over_chunk)


@triton.jit
def parts(x):
    """A multiple of 1/16, and the rest."""
    multiple = tl.floor(x * 16.0 + 0.5) * 0.0625
    return multiple, x - multiple


@triton.jit
def through_denominator(
    dh,  # (B, S, NH, DHHV), by strides
    dh_batch,
    dh_step,
    dh_head,
    h,  # (B, S, NH, DHHV)
    nq,  # (B, NH, chunks, L)
    weights,
    reads,  # (B, NH, chunks, 2, L): 1 / denominator, and the gradient of nq
    dm,  # (B, S, NH)
    S,
    NH,
    chunks,
    eps,
    DHHV: tl.constexpr,
    WIDTH: tl.constexpr,
    L: tl.constexpr,
):
    """From h = num / (max(|nq|, exp(-m)) + eps), the gradients but that of num."""
    at = tl.program_id(0).to(tl.int64)
    chunk, head, batch = at % chunks, at // chunks % NH, at // chunks // NH
    step = tl.arange(0, L)
    t, happens = chunk * L + step, step < S - chunk * L
    dh += batch * dh_batch + head * dh_head
    steps, along = (batch * S + t) * NH + head, tl.zeros((L,), tl.float32)
    for start in range(0, DHHV, WIDTH):
        x = start + tl.arange(0, WIDTH)
        mask = happens[:, None] & (x < DHHV)[None, :]
        dh_x = tl.load(dh + t[:, None] * dh_step + x[None, :], mask=mask, other=0.0)
        h_x = tl.load(h + steps[:, None] * DHHV + x[None, :], mask=mask, other=0.0)
        along += tl.sum(dh_x.to(tl.float32) * h_x.to(tl.float32), 1)
    nq_t, floor = tl.load(nq + at * L + step), tl.load(weights + at * (7 * L) + 6 * L + step)
    r = 1.0 / (tl.maximum(tl.abs(nq_t), floor) + eps)
    along *= r
    d_nq = tl.where(tl.abs(nq_t) > floor, tl.where(nq_t > 0, -along, along), 0.0)
    reads += at * (2 * L) + step
    tl.store(reads, tl.where(happens, r, 0.0))
    tl.store(reads + L, d_nq)
    tl.store(dm + steps, -eps * along, mask=happens)


@triton.jit
def chain(added, over, first, segments, SIZE, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """In place, from what segments add to a memory to what they start from.

    `added` (heads, segments, SIZE); `over` (heads, segments), what each leaves of the memory
    before it; `first` (heads, SIZE).
    """
    blocks = tl.cdiv(SIZE, BLOCK)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    memory = tl.load(first + head * SIZE + x, mask=x < SIZE, other=0.0)
    for number in range(segments):
        segment = head * segments + (segments - 1 - number if BACK else number)
        at = added + segment * SIZE + x
        more = tl.load(at, mask=x < SIZE, other=0.0)
        tl.store(at, memory, mask=x < SIZE)
        memory = memory * tl.load(over + segment) + more
