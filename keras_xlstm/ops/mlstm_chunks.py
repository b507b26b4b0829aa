"""The chunkwise mLSTM with its gradient written out, for frameworks that compile it.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. A scan walks the sequence in groups
of chunks: all chunks of a group are computed in batched products, the states at their starts too,
since a state is the weighted sum of what the chunks before it added. A group holds as many chunks
as its temporaries fit the cache: many of small heads, one of large heads. The backward pass keeps
the inputs, h, and the states at the starts of chunks; it walks the groups from the last to the
first, and computes all else again.

Two things make it exact:

- Logarithms of decays are differences of prefix sums that come in three parts, so that small ones
  survive beside large ones: see `prefix_sums`.
- A stabilizer only scales, so its gradient cancels, but for eps and the last state. What is left
  flows to the step that set the maximum.

Everything is computed in float32, whatever the inputs come in.

The backend brings the loop, as `jax.lax.scan` does it: `scan(body, state, inputs, reverse=False)`.
"""

import math
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_xlstm.ops.mlstm import MAX_EXPONENT, NEVER

GROUP_SIZE = 2**19  # elements of the largest temporary of a group


@dataclass(frozen=True)
class Chunks:
    """How a sequence is cut: G chunks of L steps in a group; the last group may be filled up."""

    L: int
    G: int
    scan: Any

    @classmethod
    def of(cls, q, v, chunk_size, scan):
        (B, S, NH, DHQK), DHHV = q.shape, v.shape[-1]
        L = chunk_size or (64 if DHQK * DHHV < 2**16 else 128)
        if not isinstance(S, int):  # a symbol
            return cls(L, 1, scan)
        L = min(L, S)
        chunks = -(-S // L)
        rows = B if isinstance(B, int) else 1
        most = GROUP_SIZE // (rows * NH * max(L * L, L * DHHV, DHQK * DHHV))
        # The most that fit, of which a whole number makes up the sequence.
        G = next((G for G in range(min(most, chunks), 1, -1) if chunks % G == 0), 1)
        return cls(L, G, scan)

    def split(self, x, fill=0.0):
        """(B, S, NH, ...) -> (groups, B, NH, G, L, ...), float32."""
        B, S, *rest = ops.shape(x)
        groups = -(-S // (self.G * self.L))
        missing = groups * self.G * self.L - S
        x = ops.cast(x, "float32")
        if not isinstance(missing, int) or missing:
            pad = [[0, 0], [0, missing]] + [[0, 0]] * len(rest)
            x = ops.pad(x, pad, constant_values=fill)
        x = ops.reshape(x, (B, groups, self.G, self.L, *rest))
        return ops.transpose(x, (1, 0, 4, 2, 3, *range(5, len(x.shape))))

    def join(self, x, S):
        """The way back of `split`, cut to S steps."""
        groups, B, NH, G, L, *rest = ops.shape(x)
        x = ops.transpose(x, (1, 0, 3, 4, 2, *range(5, len(x.shape))))
        return ops.reshape(x, (B, groups * G * L, NH, *rest))[:, :S]

    def split_inputs(self, q, k, v, i, log_f, s):
        gates = self.split(i, NEVER), self.split(log_f), self.split(s, NEVER)
        return *map(self.split, (q, k, v)), *gates


def forward(chunks, eps, q, k, v, i, log_f, s, C, n, m, keep=True):
    """Returns (h, C, n, m), and with `keep` what `backward` wants besides the inputs."""

    def group(state, inputs):
        C, n, start_m = state
        q, k, v, *gates = inputs
        w = Weights(q.shape[-1], *gates, start_m)
        k_end = k * w.to_end[..., None]
        Cs, C = next_states(ops.einsum("bhgjd,bhgjv->bhgdv", k_end, v), C, w)
        ns, n = next_states(ops.sum(k_end, -2), n, w)
        inner = ops.einsum("bhgtd,bhgjd->bhgtj", q, k) * w.inside()
        num = ops.einsum("bhgtj,bhgjv->bhgtv", inner, v)
        num = num + w.from_start[..., None] * ops.einsum("bhgtd,bhgdv->bhgtv", q, Cs)
        nq = ops.sum(inner, -1) + w.from_start * ops.sum(q * ns[..., None, :], -1)
        h = num / w.denominator(nq, eps)[..., None]
        return (C, n, w.m[..., -1]), (h, *((nq, w.m_t, start_m, Cs, ns) if keep else ()))

    inputs = chunks.split_inputs(q, k, v, i, log_f, s)
    state, (h, *kept) = chunks.scan(group, (C, n, m), inputs)
    outputs = chunks.join(h, ops.shape(q)[1]), *state
    return outputs, (*outputs[:3], *kept) if keep else ()


def backward(chunks, eps, inputs, kept, dh, dC, dn, dm):
    """The gradients with respect to all inputs."""
    q, k, v, i, log_f, s, C, n, m = inputs
    h, C_end, n_end, nq, m_t, start_m, Cs, ns = kept

    def group(later, inputs):
        q, k, v, *gates, h, dh, nq, m_t, start_m, Cs, ns = inputs
        w = Weights(q.shape[-1], *gates, start_m, m_t)
        P = w.inside()

        # h = num / (max(|nq|, exp(-m)) + eps)
        d_num = dh / w.denominator(nq, eps)[..., None]
        along = ops.sum(d_num * h, -1)
        d_nq = ops.where(ops.abs(nq) > w.floor(), -along * ops.sign(nq), 0.0)
        dm_t = -eps * along

        # num = (P * q k^T) v + from_start * q C, and nq with n for C and 1 for v
        inner = ops.einsum("bhgtd,bhgjd->bhgtj", q, k) * P
        d_inner = ops.einsum("bhgtv,bhgjv->bhgtj", d_num, v) + d_nq[..., None]
        dv = ops.einsum("bhgtj,bhgtv->bhgjv", inner, d_num)
        d_inside = inner * d_inner  # of logarithms, as all of these
        d_qk = d_inner * P
        d_num, d_nq = d_num * w.from_start[..., None], d_nq * w.from_start
        dq = ops.einsum("bhgtv,bhgdv->bhgtd", d_num, Cs) + d_nq[..., None] * ns[..., None, :]
        d_from_start = ops.sum(dq * q, -1)
        dq = dq + ops.einsum("bhgtj,bhgjd->bhgtd", d_qk, k)
        dk = ops.einsum("bhgtj,bhgtd->bhgjd", d_qk, q)

        # C' = between * C + (to_end * k) v^T, and n' with 1 for v
        dC, dn = later
        dCs = ops.einsum("bhgtd,bhgtv->bhgdv", q, d_num)
        dns = ops.sum(q * d_nq[..., None], -2)
        dC_ends, dC, d_between = earlier_states(dCs, dC, Cs, w)
        dn_ends, dn, d_between_n = earlier_states(dns, dn, ns, w)
        dk_end = ops.einsum("bhgjv,bhgdv->bhgjd", v, dC_ends) + dn_ends[..., None, :]
        dk_end = dk_end * w.to_end[..., None]
        d_to_end = ops.sum(dk_end * k, -1)
        dv = dv + ops.einsum("bhgjd,bhgdv->bhgjv", k * w.to_end[..., None], dC_ends)

        di = ops.sum(d_inside, -2) + d_to_end
        dlog_f = through_decays(d_inside, d_from_start, d_to_end, d_between + d_between_n)
        return (dC, dn), (dq, dk + dk_end, dv, di, dlog_f, dm_t)

    stacked = chunks.split_inputs(q, k, v, i, log_f, s)
    stacked = *stacked, chunks.split(h), chunks.split(dh), nq, m_t, start_m, Cs, ns
    (dC_start, dn_start), outputs = chunks.scan(group, (dC, dn), stacked, reverse=True)
    S = ops.shape(q)[1]
    dq, dk, dv, di, dlog_f, dm_t = (chunks.join(x, S) for x in outputs)

    dm = dm - ops.sum(dC * C_end, (-1, -2)) - ops.sum(dn * n_end, -1)
    ds, more, dm = to_the_maximum(dm_t, dm, chunks.join(m_t, S), log_f, s, m)
    dm = dm + ops.sum(dC_start * C, (-1, -2)) + ops.sum(dn_start * n, -1)
    dq, dk, dv = (ops.cast(dx, x.dtype) for dx, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, di, dlog_f + more, ds, dC_start, dn_start, dm


class Weights:
    """What a group's gates weigh, of gates (B, NH, G, L)."""

    def __init__(self, DHQK, i, log_f, s, start_m, m_t=None):
        sums = prefix_sums(log_f)
        decays = differences(sums)
        # From chunk to chunk, (B, NH, G + 1, G + 1), and the stabilizers at their ends.
        zero = ops.zeros_like(start_m[..., None])
        ends = [ops.concatenate([zero, ops.cumsum(x[..., -1], -1)], -1) for x in sums]
        between = differences(ends)
        offered = ops.max(decays + s[..., None, :], -1)
        offers = ops.concatenate([start_m[..., None], offered[..., -1]], -1)
        m = ops.max(between + offers[..., None, :], -1)
        from_start = total(sums) + m[..., :-1, None]
        self.m, self.m_t = m, ops.maximum(from_start, offered) if m_t is None else m_t

        self.scale = 1 / math.sqrt(DHQK)
        self.logarithms = decays + (i[..., None, :] - self.m_t[..., :, None])
        self.from_start = self.scale * ops.exp(from_start - self.m_t)
        self.to_end = ops.exp(decays[..., -1, :] + (i - m[..., 1:, None]))
        self.between = ops.exp(between + (m[..., None, :] - m[..., :, None]))
        self.over_chunk = ops.exp(total([x[..., -1] for x in sums]) + (m[..., :-1] - m[..., 1:]))

    def inside(self):
        return self.scale * ops.exp(self.logarithms)

    def floor(self):
        return ops.exp(ops.minimum(-self.m_t, MAX_EXPONENT))

    def denominator(self, nq, eps):
        return ops.maximum(ops.abs(nq), self.floor()) + eps


def prefix_sums(log_f):
    """Sums of log_f up to each step, in three parts of which differences are exact or small.

    Multiples of 1/64, whose sums float32 holds exactly up to 2^18; the small rests of them; and
    what lies below -1024, a reset above all.
    """
    bounded = ops.maximum(log_f, -1024.0)
    coarse = ops.round(bounded * 64) / 64
    return [ops.cumsum(x, -1) for x in (coarse, bounded - coarse, log_f - bounded)]


def total(sums):
    coarse, fine, beyond = sums
    return (coarse + beyond) + fine


def differences(sums):
    """(..., L) -> (..., L, L): at [t, j] the sum over j < l <= t; NEVER where j > t."""
    decays = total([x[..., :, None] - x[..., None, :] for x in sums])
    return ops.where(up_to(decays.shape[-1]), decays, NEVER)


def up_to(L):
    """(L, L), at [t, j] whether j <= t."""
    steps = ops.arange(L)
    return steps[:, None] >= steps[None, :]


def through_decays(d_inside, d_from_start, d_to_end, d_between):
    """The gradient of log_f, from those of the logarithms of all weights.

    A gate at l is part of what lies between j < l and t >= l. The sums hold no other terms: those
    would cancel, but leave their rounding errors.
    """
    from_l_on = ops.cast(up_to(d_inside.shape[-1]), "float32")  # [t, l]: t >= l
    passing = ops.matmul(d_inside, 1 - from_l_on) + d_from_start[..., None]
    passing = ops.sum(passing * from_l_on, -2)
    return passing + (ops.cumsum(d_to_end, -1) - d_to_end) + d_between[..., None]


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
    return ops.einsum(subscripts.replace("...", "xyz"[: len(states.shape) - 3]), weights, states)


def expand(x, like):
    return ops.reshape(x, (*ops.shape(x), *[1] * (len(like.shape) - len(x.shape))))


def to_the_maximum(dm_t, dm_end, m_t, log_f, s, m):
    """Hands gradients of the stabilizers, (B, S, NH), to the step that set each maximum.

    m_t is s_t, or else log_f_t + m_(t-1), and so on back.
    """
    dm_t = ops.concatenate([dm_t[:, :-1], dm_t[:, -1:] + dm_end[:, None]], 1)
    before = ops.concatenate([m[:, None], m_t[:, :-1]], 1)
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
