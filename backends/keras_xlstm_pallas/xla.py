"""The chunkwise mLSTM for JAX, compiled by XLA: one fused body a chunk, in a scan.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. Only the states at the chunks'
starts are kept for the backward pass; the L x L matrices are computed again (`jax.checkpoint`).
Matrix products take their operands in the compute dtype and add up in float32.
"""

import functools

import jax
import jax.numpy as jnp

from keras_xlstm.ops.mlstm import CHUNK_SIZE, MAX_EXPONENT, NEVER


@functools.partial(jax.jit, static_argnames=("chunk_size", "eps"))
def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    S = q.shape[1]
    L = chunk_size or CHUNK_SIZE
    if isinstance(S, int):  # and not a symbol
        L = min(L, S)
    num_chunks = -(-S // L)

    def chunks(x, fill=0.0):
        """(B, S, NH, ...) -> (chunks, B, NH, L, ...), a last partial chunk filled up."""
        pad = [(0, 0), (0, num_chunks * L - S)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        x = x.reshape(x.shape[0], num_chunks, L, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, 3)

    inputs = (*map(chunks, (q, k, v, log_f)), chunks(i, NEVER), chunks(s, NEVER))
    body = jax.checkpoint(functools.partial(_one_chunk, eps=eps))
    state, h = jax.lax.scan(body, state, inputs)  # h: (chunks, B, NH, L, DHHV)
    h = jnp.moveaxis(jnp.moveaxis(h, 3, 2), 0, 1)
    return h.reshape(h.shape[0], num_chunks * L, *h.shape[3:])[:, :S], state


def _one_chunk(state, inputs, eps):
    C, n, m = state  # (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH)
    q, k, v, log_f, i, s = inputs  # (B, NH, L, D), (B, NH, L)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scale, dtype = q.shape[-1] ** -0.5, q.dtype

    decay = _segment_sums(log_f)  # (B, NH, L, L)
    b = jnp.cumsum(log_f, axis=-1)
    D = decay + i[..., None, :]
    m_inner = jnp.max(decay + s[..., None, :], axis=-1)
    m_t = jnp.maximum(b + m[..., None], m_inner)

    inner = product("bhtd,bhjd->bhtj", q, k) * scale * jnp.exp(D - m_t[..., None])
    outer = scale * jnp.exp(b + m[..., None] - m_t)
    num = product("bhtj,bhjv->bhtv", inner.astype(dtype), v)
    num += outer[..., None] * product("bhtd,bhdv->bhtv", q, C.astype(dtype))
    nq = jnp.sum(inner, -1) + outer * product("bhtd,bhd->bht", q, n.astype(dtype))
    floor = jnp.exp(jnp.minimum(-m_t, MAX_EXPONENT))
    h = num / (jnp.maximum(jnp.abs(nq), floor) + eps)[..., None]

    m_next = m_t[..., -1]
    old = jnp.exp(b[..., -1] + m - m_next)[..., None]
    k = k * jnp.exp(D[..., -1, :] - m_next[..., None])[..., None]
    C = old[..., None] * C + product("bhjd,bhjv->bhdv", k.astype(dtype), v)
    n = old * n + jnp.sum(k, -2)
    return (C, n, m_next), h


def _segment_sums(x):
    """(..., L) -> (..., L, L): [t, j] is the sum of x over j < l <= t; NEVER where j > t."""
    later = jnp.tri(x.shape[-1], k=-1, dtype=bool)  # [l, j]: l > j
    sums = jnp.cumsum(jnp.where(later, x[..., None], 0.0), axis=-2)
    return jnp.where(later.T, NEVER, sums)
