"""The chunkwise mLSTM for JAX, compiled by XLA, with its gradient written out.

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

Matrix products take their operands in bfloat16 where the inputs come in it, and add up in float32.
All else, gates, normalizer and stabilizer, is float32.
"""

import functools

import jax
import jax.numpy as jnp

from keras_xlstm.ops.mlstm import MAX_EXPONENT, NEVER

GROUP_SIZE = 2**19  # elements of the largest temporary of a group


@functools.partial(jax.jit, static_argnames=("chunk_size", "eps"))
def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    (B, S, NH, DHQK), DHHV = q.shape, v.shape[-1]
    L, G = chunk_size or chunk_size_for(DHQK, DHHV), 1
    if isinstance(S, int):  # and not a symbol
        L = min(L, S)
        G = chunks_in_a_group(-(-S // L), B * NH * max(L * L, L * DHHV, DHQK * DHHV))
    pad = [(0, 0), (0, -S % (G * L))]

    def fill(x, value=0.0):
        return jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2), constant_values=value)

    inputs = (*map(fill, (q, k, v)), fill(i, NEVER), fill(log_f), fill(s, NEVER))
    h, state = chunkwise(L, G, eps, *inputs, state)
    return h[:, :S], state


def chunk_size_for(DHQK, DHHV):
    return 64 if DHQK * DHHV < 2**16 else 128


def chunks_in_a_group(chunks, temporary):
    """The most that fit, of which a whole number makes up the sequence."""
    most = GROUP_SIZE // temporary if isinstance(temporary, int) else 1
    return next((G for G in range(min(most, chunks), 1, -1) if chunks % G == 0), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def chunkwise(L, G, eps, q, k, v, i, log_f, s, state):
    (h, state), _ = forward(L, G, eps, q, k, v, i, log_f, s, state, keep=False)
    return h, state


def forward(L, G, eps, q, k, v, i, log_f, s, state, keep=True):
    def group(state, inputs):
        C, n, start_m = state
        q, k, v, *gates = inputs
        w = Weights(q.shape[-1], *gates, start_m)
        k_end = k * w.to_end[..., None]
        Cs, C = next_states(product("bhgjd,bhgjv->bhgdv", k_end, v, like=q), C, w)
        ns, n = next_states(jnp.sum(k_end, -2), n, w)
        inner = product("bhgtd,bhgjd->bhgtj", q, k) * w.inside()
        num = product("bhgtj,bhgjv->bhgtv", inner, v, like=q)
        num += w.from_start[..., None] * product("bhgtd,bhgdv->bhgtv", q, Cs, like=q)
        nq = jnp.sum(inner, -1) + w.from_start * jnp.einsum("bhgtd,bhgd->bhgt", q, ns)
        h = num / w.denominator(nq, eps)[..., None]
        return (C, n, w.m[..., -1]), (h, *((nq, w.m_t, start_m, Cs, ns) if keep else ()))

    inputs = [split(x, L, G) for x in (q, k, v, i, log_f, s)]
    end, (h, *kept) = jax.lax.scan(group, state, tuple(inputs))
    h = join(h)
    return (h, end), ((q, k, v, i, log_f, s, state), h, end, tuple(kept))


def backward(L, G, eps, residuals, gradients):
    (q, k, v, i, log_f, s, state), h, end, kept = residuals
    dh, (dC, dn, dm) = gradients

    def group(later, inputs):
        (q, k, v, *gates), h, dh, (nq, m_t, start_m, Cs, ns) = inputs
        w = Weights(q.shape[-1], *gates, start_m, m_t)
        P = w.inside()

        # h = num / (max(|nq|, exp(-m)) + eps)
        d_num = dh / w.denominator(nq, eps)[..., None]
        along = jnp.sum(d_num * h, -1)
        d_nq = jnp.where(jnp.abs(nq) > w.floor(), -along * jnp.sign(nq), 0)
        dm_t = -eps * along

        # num = (P * q k^T) v + from_start * q C, and nq with n for C and 1 for v
        inner = product("bhgtd,bhgjd->bhgtj", q, k) * P
        d_inner = product("bhgtv,bhgjv->bhgtj", d_num, v, like=q) + d_nq[..., None]
        dv = product("bhgtj,bhgtv->bhgjv", inner, d_num, like=q)
        d_inside = inner * d_inner  # of logarithms, as all of these
        d_qk = d_inner * P
        d_num, d_nq = d_num * w.from_start[..., None], d_nq * w.from_start
        dq = product("bhgtv,bhgdv->bhgtd", d_num, Cs, like=q)
        dq += d_nq[..., None] * ns[..., None, :]
        d_from_start = jnp.sum(dq * q, -1)
        dq += product("bhgtj,bhgjd->bhgtd", d_qk, k, like=q)
        dk = product("bhgtj,bhgtd->bhgjd", d_qk, q, like=q)

        # C' = between * C + (to_end * k) v^T, and n' with 1 for v
        dC, dn = later
        dCs = product("bhgtd,bhgtv->bhgdv", q, d_num, like=q)
        dns = jnp.einsum("bhgtd,bhgt->bhgd", q, d_nq)
        dC_ends, dC, d_between = earlier_states(dCs, dC, Cs, w)
        dn_ends, dn, d_between_n = earlier_states(dns, dn, ns, w)
        dk_end = product("bhgjv,bhgdv->bhgjd", v, dC_ends, like=q) + dn_ends[..., None, :]
        dk_end *= w.to_end[..., None]
        d_to_end = jnp.sum(dk_end * k, -1)
        k_end = k * w.to_end[..., None]
        dv += product("bhgjd,bhgdv->bhgjv", k_end, dC_ends, like=q)

        di = jnp.sum(d_inside, -2) + d_to_end
        dlog_f = through_decays(d_inside, d_from_start, d_to_end, d_between + d_between_n)
        return (dC, dn), (dq, dk + dk_end, dv, di, dlog_f, dm_t)

    inputs = [split(x, L, G) for x in (q, k, v, i, log_f, s)]
    xs = tuple(inputs), split(h, L, G), split(dh, L, G), kept
    (dC_start, dn_start), outputs = jax.lax.scan(group, (dC, dn), xs, reverse=True)
    dq, dk, dv, di, dlog_f, dm_t = map(join, outputs)

    dm -= jnp.sum(dC * end[0], (-1, -2)) + jnp.sum(dn * end[1], -1)
    m_t = join(kept[1])
    ds, more, dm = to_the_maximum(dm_t, dm, m_t, log_f, s, state[2])
    dm += jnp.sum(dC_start * state[0], (-1, -2)) + jnp.sum(dn_start * state[1], -1)
    dq, dk, dv = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return dq, dk, dv, di, dlog_f + more, ds, (dC_start, dn_start, dm)


chunkwise.defvjp(forward, backward)


class Weights:
    """What a group's gates weigh, of gates (B, NH, G, L)."""

    def __init__(self, DHQK, i, log_f, s, start_m, m_t=None):
        b = prefix_sums(log_f)
        decays = differences(b)
        ends = [jnp.pad(jnp.cumsum(x[..., -1], -1), [(0, 0)] * 2 + [(1, 0)]) for x in b]
        decays_between = differences(ends)  # (B, NH, G + 1, G + 1)
        # The stabilizers at the ends of chunks, before the first too, and of all steps.
        offered = jnp.max(decays + s[..., None, :], -1)
        offers = jnp.concatenate([start_m[..., None], offered[..., -1]], -1)
        m = jnp.max(decays_between + offers[..., None, :], -1)
        from_start = total(b) + m[..., :-1, None]
        m_t = jnp.maximum(from_start, offered) if m_t is None else m_t
        self.m, self.m_t = m, m_t
        self.scale = DHQK**-0.5
        self.logarithms = decays + (i[..., None, :] - m_t[..., :, None])
        self.from_start = self.scale * jnp.exp(from_start - m_t)
        self.to_end = jnp.exp(decays[..., -1, :] + (i - m[..., 1:, None]))
        self.between = jnp.exp(decays_between + (m[..., None, :] - m[..., :, None]))

    def inside(self):
        return self.scale * jnp.exp(self.logarithms)

    def floor(self):
        return jnp.exp(jnp.minimum(-self.m_t, MAX_EXPONENT))

    def denominator(self, nq, eps):
        return jnp.maximum(jnp.abs(nq), self.floor()) + eps


def prefix_sums(log_f):
    """Sums of log_f up to each step, in three parts of which differences are exact or small.

    Multiples of 1/64, whose sums float32 holds exactly up to 2^18; the small rests of them; and
    what lies below -1024, a reset above all.
    """
    bounded = jnp.maximum(log_f, -1024.0)
    coarse = jnp.round(bounded * 64) / 64
    return [jnp.cumsum(x, -1) for x in (coarse, bounded - coarse, log_f - bounded)]


def total(sums):
    coarse, fine, beyond = sums
    return (coarse + beyond) + fine


def differences(sums):
    """(..., L) -> (..., L, L): at [t, j] the sum over j < l <= t; NEVER where j > t."""
    parts = [x[..., :, None] - x[..., None, :] for x in sums]
    L = sums[0].shape[-1]
    return jnp.where(jnp.tri(L, dtype=bool), total(parts), NEVER)


def through_decays(d_inside, d_from_start, d_to_end, d_between):
    """The gradient of log_f, from those of the logarithms of all weights.

    A gate at l is part of what lies between j < l and t >= l. The sums hold no other terms: those
    would cancel, but leave their rounding errors.
    """
    lower = jnp.tri(d_inside.shape[-1], dtype=jnp.float32)  # [t, l]: t >= l
    before = 1 - lower  # [j, l]: j < l
    passing = jnp.einsum("...tj,jl->...tl", d_inside, before, precision="highest")
    passing = jnp.sum((passing + d_from_start[..., None]) * lower, -2)
    return passing + (jnp.cumsum(d_to_end, -1) - d_to_end) + d_between[..., None]


def next_states(added, state, w):
    """The states at the starts of the chunks, (B, NH, G, ...), and after the last."""
    if added.shape[2] == 1:
        old = w.between[..., 1, 0]
        return state[:, :, None], added[:, :, 0] + expand(old, state) * state
    states = jnp.concatenate([state[:, :, None], added], 2)
    states = jnp.einsum("bhef,bhf...->bhe...", w.between, states)
    return states[:, :, :-1], states[:, :, -1]


def earlier_states(d_starts, later, starts, w):
    """The gradients of the states at the chunks' ends, at the group's start, and of `between`."""
    if starts.shape[2] == 1:
        old = w.between[..., 1, 0]
        ends, earlier = later[:, :, None], d_starts[:, :, 0] + expand(old, later) * later
    else:
        states = jnp.concatenate([d_starts, later[:, :, None]], 2)
        states = jnp.einsum("bhfe,bhf...->bhe...", w.between, states)
        ends, earlier = states[:, :, 1:], states[:, :, 0]
    old = jnp.diagonal(w.between, -1, -2, -1)
    return ends, earlier, old * jnp.sum(ends * starts, tuple(range(3, starts.ndim)))


def expand(x, like):
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))


def to_the_maximum(dm_t, dm_end, m_t, log_f, s, m):
    """Hands gradients of the stabilizers, (B, S, NH), to the step that set each maximum.

    m_t is s_t, or else log_f_t + m_(t-1), and so on back.
    """
    dm_t = dm_t.at[:, -1].add(dm_end)
    before = jnp.concatenate([m[:, None], m_t[:, :-1]], 1)
    offered = s >= log_f + before
    passes = jnp.concatenate([~offered[:, 1:], jnp.ones_like(offered[:, :1])], 1)

    def combine(x, y):
        return x[0] & y[0], jnp.where(y[0], x[1], 0) + y[1]

    _, sums = jax.lax.associative_scan(combine, (passes, dm_t), reverse=True, axis=1)
    back = jnp.where(offered, 0, sums)
    return jnp.where(offered, sums, 0), back, back[:, 0]


def product(subscripts, x, y, like=None):
    if like is not None:
        # Not float16: products of small weights and gradients would leave its range.
        dtype = jnp.bfloat16 if like.dtype == jnp.bfloat16 else jnp.float32
        x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def split(x, L, G):
    """(B, S, NH, ...) -> (groups, B, NH, G, L, ...)."""
    x = x.reshape(x.shape[0], -1, G, L, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 4, 2)


def join(x):
    """The way back of `split`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 4), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[4:])
