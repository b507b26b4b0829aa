"""Kernels for JAX that XLA compiles, each with its gradient written out in `keras_xlstm/ops`.

Under `jit`, `vmap` and reverse-mode derivatives of any order. JAX refuses forward mode, since the
gradients are our own; the kernels in plain `keras.ops` have it.
"""

import functools

import jax
import jax.numpy as jnp

from keras_xlstm.ops import mlstm_chunks, slstm_loop


def why_not(sequence, *args, **kwargs):
    if not isinstance(sequence.shape[1], int):  # a symbol, as in an export for any length
        return f"needs a length that is known when it is traced, received {sequence.shape[1]}"


def how(q, k, v, *args, chunk_size, eps):
    return str(mlstm_chunks.Chunks.of(q, v, chunk_size))


@functools.partial(jax.jit, static_argnames=("chunk_size", "eps"))
def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    chunks = mlstm_chunks.Chunks.of(q, v, chunk_size)
    h, *state = _mlstm(chunks, eps, q, k, v, i, log_f, s, *state)
    return h, tuple(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlstm(chunks, eps, *inputs):
    return mlstm_chunks.forward(chunks, eps, *inputs, keep=False)[0]


def _mlstm_forward(chunks, eps, *inputs):
    outputs, kept = mlstm_chunks.forward(chunks, eps, *inputs)
    return outputs, (inputs, outputs, kept)


def _mlstm_backward(chunks, eps, residuals, gradients):
    return mlstm_chunks.backward(chunks, eps, *residuals, *gradients)


_mlstm.defvjp(_mlstm_forward, _mlstm_backward)


@jax.jit
def slstm(*inputs):
    return _slstm(*inputs)


@jax.custom_vjp
def _slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    inputs = gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale
    return slstm_loop.forward(jax.lax.scan, *inputs, keep=False)[0]


def _slstm_forward(*inputs):
    outputs, kept = slstm_loop.forward(jax.lax.scan, *inputs)
    return outputs, (inputs, kept)


def _slstm_backward(residuals, gradients):
    *gradients, d_scale = slstm_loop.backward(jax.lax.scan, *residuals, *gradients)
    return *gradients, None, None, d_scale


_slstm.defvjp(_slstm_forward, _slstm_backward)


@jax.custom_vjp
def cross_entropy(logits, targets):
    """In float32, without copies of the logits for their logarithms and for the targets."""
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits, targets):
    x = logits.astype("float32")
    largest = jnp.max(x, -1, keepdims=True)
    sums = jax.lax.platform_dependent(
        jnp.exp(x - largest), cpu=_sum_by_product, default=functools.partial(jnp.sum, axis=-1)
    )
    total = jnp.log(sums) + largest[..., 0]
    picked = jnp.take_along_axis(x, targets[..., None], -1)[..., 0]
    return (total - picked).astype(logits.dtype), (logits, targets, total)


def _sum_by_product(x):
    """On a CPU XLA takes one thread for a sum, and for what it is a sum of."""
    return jnp.matmul(x, jnp.ones(x.shape[-1], x.dtype), precision="highest")


def _cross_entropy_backward(residuals, d_loss):
    logits, targets, total = residuals
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    off = jnp.exp(logits.astype("float32") - total[..., None]) - (ids == targets[..., None])
    return (d_loss[..., None] * off).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
