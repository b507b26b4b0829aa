"""The chunkwise mLSTM with its gradient written out, for frameworks that compile it.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. The stabilizers of all steps come
first. A loop then walks the sequence in groups of chunks, reads each group where it lies, and
writes what it computes in place: nothing but the outputs and the states at the starts of groups is
as long as the sequence. All chunks of a group are computed in batched products, the states at
their starts too, since a state is the weighted sum of what the chunks before it added. A group
holds as many chunks as its temporaries fit the cache: many of small heads, one of large heads. The
backward pass keeps the inputs, h, and those states; it walks the groups from the last to the
first, and computes all else again.

Two things make it exact:

- Logarithms of decays are differences of prefix sums that come in three parts, so that small ones
  survive beside large ones: see `in_parts`.
- A stabilizer only scales, so its gradient cancels, but for eps and the last state. What is left
  flows to the step that set the maximum.

Everything is computed in float32, whatever the inputs come in.
"""

import math
from dataclasses import dataclass

from keras import ops

from keras_xlstm.ops.mlstm import MAX_EXPONENT, NEVER
from keras_xlstm.ops.products import einsum

GROUP_SIZE = 2**19  # elements of the largest temporary of a group
SHUT = -(2.0**18)  # for NEVER in sums: shut for gates within GATE_LIMIT, and sums stay exact


@dataclass(frozen=True)
class Chunks:
    """How a sequence is cut: into groups of G chunks of L steps."""

    L: int
    G: int

    @classmethod
    def of(cls, q, v, chunk_size):
        (B, S, NH, DHQK), DHHV = q.shape, v.shape[-1]
        L = chunk_size or (64 if DHQK * DHHV < 2**16 else 128)
        if not isinstance(S, int):  # a symbol
            return cls(L, 1)
        chunks = max(-(-S // L), 1)
        L = min(L, S) if chunk_size else -(-S // chunks)  # of equal lengths: little to fill up
        rows = B if isinstance(B, int) else 1
        most = GROUP_SIZE // (rows * NH * max(L * L, L * DHHV, DHQK * DHHV))
        # The most that fit, of which a whole number makes up the sequence.
        G = next((G for G in range(min(most, chunks), 1, -1) if chunks % G == 0), 1)
        return cls(L, G)

    def __str__(self):
        return f"in chunks of {self.L} steps, {self.G} of them at a time"

    def groups(self, S):
        return -(-S // (self.G * self.L))

    def fill(self, x, value=0.0):
        """Up to a whole number of groups."""
        S = x.shape[1]
        missing = self.groups(S) * self.G * self.L - S
        if not missing:
            return x
        pad = [[0, 0], [0, missing]] + [[0, 0]] * (len(x.shape) - 2)
        return ops.pad(x, pad, constant_values=value)

    def fill_inputs(self, q, k, v, i, log_f, s):
        gates = self.fill(i, NEVER), self.fill(log_f), self.fill(s, NEVER)
        return *map(self.fill, (q, k, v)), *gates

    def read(self, x, number):
        """A group of (B, S, NH, ...), as (B, NH, G, L, ...), float32."""
        B, _, *rest = ops.shape(x)
        steps = self.G * self.L
        x = ops.slice(x, (0, number * steps, *[0] * len(rest)), (B, steps, *rest))
        x = ops.reshape(ops.cast(x, "float32"), (B, self.G, self.L, *rest))
        return ops.transpose(x, (0, 3, 1, 2, *range(4, len(x.shape))))

    def write(self, array, number, x):
        """The way back of `read`."""
        B, NH, G, L, *rest = ops.shape(x)
        x = ops.transpose(x, (0, 2, 3, 1, *range(4, len(x.shape))))
        x = ops.cast(ops.reshape(x, (B, G * L, NH, *rest)), array.dtype)
        return ops.slice_update(array, (0, number * G * L, *[0] * (len(rest) + 1)), x)


def forward(chunks, eps, q, k, v, i, log_f, s, C, n, m, keep=True):
    """Returns (h, C, n, m), and with `keep` what `backward` wants besides them and the inputs."""
    S = q.shape[1]
    q, k, v, i, log_f, s = chunks.fill_inputs(q, k, v, i, log_f, s)
    m_t, before = stabilizers(log_f, s, m)
    groups = chunks.groups(S)

    def group(number, carry):
        (C, n), h, nqs, kept = carry
        q_, k_, v_, *gates = (chunks.read(x, number) for x in (q, k, v, i, log_f, m_t, before))
        w = Weights(q_.shape[-1], *gates)
        start = C, n
        (Cs, C), (ns, n) = states(k_, v_, C, n, w)
        inner = einsum("bhgtd,bhgjd->bhgtj", q_, k_) * w.inside()
        num = einsum("bhgtj,bhgjv->bhgtv", inner, v_)
        num = num + w.from_start[..., None] * einsum("bhgtd,bhgdv->bhgtv", q_, Cs)
        nq = row_sums(inner) + w.from_start * einsum("bhgtd,bhgd->bhgt", q_, ns)
        h = chunks.write(h, number, num / w.denominator(nq, eps)[..., None])
        if keep:
            nqs = chunks.write(nqs, number, nq)
            kept = [
                ops.slice_update(x, (number, *[0] * (len(x.shape) - 1)), y[None])
                for x, y in zip(kept, start, strict=True)
            ]
        return (C, n), h, nqs, kept

    kept = []
    if keep:
        kept = [ops.zeros((groups, *ops.shape(x))) for x in (C, n)]
    start = (C, n), ops.zeros(ops.shape(v), "float32"), ops.zeros_like(i), kept
    (C, n), h, nqs, kept = ops.fori_loop(0, groups, group, start)
    h, m = h[:, :S], m_t[:, -1]
    return (h, C, n, m), (nqs, m_t, before, *kept)


def backward(chunks, eps, inputs, outputs, kept, dh, dC, dn, dm):
    """The gradients with respect to all inputs."""
    *sequence, C, n, _ = inputs
    h, C_end, n_end, _ = outputs
    nq, m_t, before, C_starts, n_starts = kept
    S = h.shape[1]
    q, k, v, i, log_f, s = chunks.fill_inputs(*sequence)
    h, dh = chunks.fill(h), chunks.fill(dh)
    arrays = q, k, v, i, log_f, m_t, before, h, dh, nq
    groups = chunks.groups(S)

    def group(number, carry):
        (dC, dn), outputs = carry
        number = groups - 1 - number
        q, k, v, *gates, h, dh, nq = (chunks.read(x, number) for x in arrays)
        w = Weights(q.shape[-1], *gates)
        C, n = C_starts[number], n_starts[number]
        if chunks.G == 1:
            Cs, ns = C[:, :, None], n[:, :, None]
        else:
            (Cs, _), (ns, _) = states(k, v, C, n, w)
        P = w.inside()

        # h = num / (max(|nq|, exp(-m)) + eps)
        d_num = dh / w.denominator(nq, eps)[..., None]
        along = row_sums(d_num * h)
        d_nq = ops.where(ops.abs(nq) > w.floor(), -along * ops.sign(nq), 0.0)
        dm_t = -eps * along

        # num = (P * q k^T) v + from_start * q C, and nq with n for C and 1 for v
        inner = einsum("bhgtd,bhgjd->bhgtj", q, k) * P
        d_inner = einsum("bhgtv,bhgjv->bhgtj", d_num, v) + d_nq[..., None]
        dv = einsum("bhgtj,bhgtv->bhgjv", inner, d_num)
        d_inside = inner * d_inner  # of logarithms, as all of these
        d_qk = d_inner * P
        d_num, d_nq = d_num * w.from_start[..., None], d_nq * w.from_start
        dq = einsum("bhgtv,bhgdv->bhgtd", d_num, Cs) + d_nq[..., None] * ns[..., None, :]
        d_from_start = row_sums(dq * q)
        dq = dq + einsum("bhgtj,bhgjd->bhgtd", d_qk, k)
        dk = einsum("bhgtj,bhgtd->bhgjd", d_qk, q)

        # C' = between * C + (to_end * k) v^T, and n' with 1 for v
        dCs = einsum("bhgtd,bhgtv->bhgdv", q, d_num)
        dns = einsum("bhgt,bhgtd->bhgd", d_nq, q)
        dC_ends, dC, d_between = earlier_states(dCs, dC, Cs, w)
        dn_ends, dn, d_between_n = earlier_states(dns, dn, ns, w)
        dk_end = einsum("bhgjv,bhgdv->bhgjd", v, dC_ends) + dn_ends[..., None, :]
        dk_end = dk_end * w.to_end[..., None]
        d_to_end = row_sums(dk_end * k)
        dv = dv + einsum("bhgjd,bhgdv->bhgjv", k * w.to_end[..., None], dC_ends)

        di = column_sums(d_inside) + d_to_end
        dlog_f = through_decays(d_inside, d_from_start, d_to_end, d_between + d_between_n)
        new = dq, dk + dk_end, dv, di, dlog_f, dm_t
        outputs = [chunks.write(x, number, y) for x, y in zip(outputs, new, strict=True)]
        return (dC, dn), outputs

    outputs = [ops.zeros_like(x) for x in (q, k, v, i, i, i)]
    (dC_start, dn_start), outputs = ops.fori_loop(0, groups, group, ((dC, dn), outputs))
    dq, dk, dv, di, dlog_f, dm_t = (x[:, :S] for x in outputs)

    dm = dm - ops.sum(dC * C_end, (-1, -2)) - ops.sum(dn * n_end, -1)
    log_f, s = sequence[-2:]
    ds, more, dm = to_the_maximum(dm_t, dm, before[:, :S], log_f, s)
    dm = dm + ops.sum(dC_start * C, (-1, -2)) + ops.sum(dn_start * n, -1)
    return dq, dk, dv, di, dlog_f + more, ds, dC_start, dn_start, dm


def stabilizers(log_f, s, m):
    """m_t = max(log_f_t + m_(t-1), s_t), and m_(t-1), both (B, S, NH), by doubling."""
    first = ops.maximum(s[:, :1], log_f[:, :1] + m[:, None])
    m_t, sums, steps = ops.concatenate([first, s[:, 1:]], 1), log_f, 1

    def earlier(x, value):
        return ops.pad(x[:, :-steps], [[0, 0], [steps, 0], [0, 0]], constant_values=value)

    while steps < s.shape[1]:
        m_t = ops.maximum(m_t, sums + earlier(m_t, NEVER))
        sums = sums + earlier(sums, 0.0)
        steps *= 2
    return m_t, ops.concatenate([m[:, None], m_t[:, :-1]], 1)


class Weights:
    """What a group's gates weigh, of gates and stabilizers (B, NH, G, L)."""

    def __init__(self, DHQK, i, log_f, m_t, before):
        sums = prefix_sums(log_f)
        decays = differences(sums)
        ends, m_start, self.m_t = m_t[..., -1], before[..., 0], m_t
        self.scale = 1 / math.sqrt(DHQK)
        self.logarithms = decays + (i[..., None, :] - m_t[..., :, None])
        self.from_start = self.scale * ops.exp(total(sums) + (m_start[..., None] - m_t))
        self.to_end = ops.exp(decays[..., -1, :] + (i - ends[..., None]))
        last = [x[..., -1] for x in sums]
        self.over_chunk = ops.exp(total(last) + (m_start - ends))
        if i.shape[2] > 1:  # From chunk to chunk, (B, NH, G + 1, G + 1).
            m = ops.concatenate([m_start[..., :1], ends], -1)
            zero = ops.zeros_like(m[..., :1])
            between = [ops.concatenate([zero, ops.cumsum(x, -1)], -1) for x in last]
            self.between = ops.exp(differences(between) + (m[..., None, :] - m[..., :, None]))

    def inside(self):
        return self.scale * ops.exp(self.logarithms)

    def floor(self):
        return ops.exp(ops.minimum(-self.m_t, MAX_EXPONENT))

    def denominator(self, nq, eps):
        return ops.maximum(ops.abs(nq), self.floor()) + eps


def prefix_sums(log_f):
    """Sums of log_f up to each step, by `in_parts`, of (B, NH, G, L).

    As products: XLA would compute its own sums again for each pair of steps.
    """
    parts = ops.stack(in_parts(log_f))
    upper = ops.cast(ops.transpose(up_to(log_f.shape[-1])), "float32")
    sums = einsum("pbhgj,jt->pbhgt", parts, upper)
    return [sums[part] for part in range(3)]


def in_parts(log_f):
    """Three that add up to log_f, and of whose sums differences are exact or small.

    Multiples of 64, multiples of 1/64 between them, and the small rests. Float32 holds sums of
    the first two exactly, up to 2^30 and 2^18.
    """
    log_f = ops.maximum(log_f, SHUT)
    large = ops.round(log_f / 64) * 64
    coarse = ops.round((log_f - large) * 64) / 64
    return large, coarse, (log_f - large) - coarse


def total(sums):
    large, coarse, fine = sums
    return (large + coarse) + fine


def differences(sums):
    """(..., L) -> (..., L, L): at [t, j] the sum over j < l <= t; NEVER where j > t."""
    decays = total([x[..., :, None] - x[..., None, :] for x in sums])
    return ops.where(up_to(decays.shape[-1]), decays, NEVER)


def up_to(L):
    """(L, L), at [t, j] whether j <= t."""
    steps = ops.arange(L)
    return steps[:, None] >= steps[None, :]


def row_sums(x):
    """Over the last axis, as products: XLA's own sums are slow on CPU."""
    return einsum("bhgij,bhgj->bhgi", x, ops.ones_like(x[..., 0, :]))


def column_sums(x):
    return einsum("bhgi,bhgij->bhgj", ops.ones_like(x[..., 0]), x)


def through_decays(d_inside, d_from_start, d_to_end, d_between):
    """The gradient of log_f, from those of the logarithms of all weights.

    A gate at l is part of what lies between j < l and t >= l. The sums hold no other terms: those
    would cancel, but leave their rounding errors.
    """
    from_l_on = up_to(d_inside.shape[-1])  # [t, l]: t >= l
    before_l = 1 - ops.cast(from_l_on, "float32")  # [j, l]: j < l
    passing = einsum("bhgtj,jl->bhgtl", d_inside, before_l) + d_from_start[..., None]
    passing = ops.where(from_l_on, passing, d_to_end[..., None])
    return column_sums(passing) + d_between[..., None]


def states(k, v, C, n, w):
    """Of C and of n: those at the starts of the chunks, and after the last."""
    added = einsum("bhgjd,bhgjv->bhgdv", k * w.to_end[..., None], v)
    added_n = einsum("bhgj,bhgjd->bhgd", w.to_end, k)
    return next_states(added, C, w), next_states(added_n, n, w)


def next_states(added, state, w):
    """The states at the starts of the chunks, (B, NH, G, ...), and after the last."""
    if added.shape[2] == 1:
        return state[:, :, None], added[:, :, 0] + expand(w.over_chunk[..., 0], state) * state
    states = ops.concatenate([state[:, :, None], added], 2)
    states = over_chunks("bhef,bhf...->bhe...", w.between, states)
    return states[:, :, :-1], states[:, :, -1]


def earlier_states(d_starts, later, starts, w):
    """The gradients of the states at the chunks' ends, at the group's start, and of `between`."""
    if starts.shape[2] == 1:
        earlier = d_starts[:, :, 0] + expand(w.over_chunk[..., 0], later) * later
        ends = later[:, :, None]
    else:
        states = ops.concatenate([d_starts, later[:, :, None]], 2)
        states = over_chunks("bhfe,bhf...->bhe...", w.between, states)
        ends, earlier = states[:, :, 1:], states[:, :, 0]
    return ends, earlier, w.over_chunk * ops.sum(ends * starts, tuple(range(3, len(starts.shape))))


def over_chunks(subscripts, weights, states):
    return einsum(subscripts.replace("...", "xyz"[: len(states.shape) - 3]), weights, states)


def expand(x, like):
    return ops.reshape(x, (*ops.shape(x), *[1] * (len(like.shape) - len(x.shape))))


def to_the_maximum(dm_t, dm_end, before, log_f, s):
    """Hands gradients of the stabilizers, (B, S, NH), to the step that set each maximum.

    m_t is s_t, or else log_f_t + m_(t-1), and so on back.
    """
    dm_t = ops.concatenate([dm_t[:, :-1], dm_t[:, -1:] + dm_end[:, None]], 1)
    offered = s >= log_f + before
    sums, passes = dm_t, ops.logical_not(offered)

    def later(x, steps):
        return ops.pad(x[:, steps:], [[0, 0], [0, steps], [0, 0]])

    # sums_t = dm_t + sums_(t+1) where step t + 1 offered nothing, by doubling.
    steps, passes = 1, later(passes, 1)
    while steps < dm_t.shape[1]:
        sums = sums + ops.where(passes, later(sums, steps), 0.0)
        passes = ops.logical_and(passes, later(passes, steps))
        steps *= 2
    back = ops.where(offered, 0.0, sums)
    return ops.where(offered, sums, 0.0), back, back[:, 0]
