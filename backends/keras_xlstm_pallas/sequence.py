"""Both operations on sequences whose steps are split over devices, for JAX.

A kernel around kernels: on each device another one, the best that can, computes the segment that
lies there. Other axes, of batch and heads, stay with the partitioner.

The mLSTM. A segment maps the state before it to that after it,

    m' = max(A + m, M)      C' = exp(A + m - m') C + exp(M - m') D      n' likewise, with d

where A sums log_f over the segment, M is what its steps offer to the stabilizer at its end, and D
and d are what they add to C and n, over exp(M). Two such maps after one another are one again, so
that a scan over P devices takes log2(P) exchanges.

The sLSTM has no such maps. Device p takes the turns p, p + 1, ..., one for each piece of the batch,
and hands its state to device p + 1 after each.
"""

import contextlib
import functools
from typing import NamedTuple

import jax
import keras
from jax import lax
from jax import numpy as jnp

from keras_xlstm import kernels
from keras_xlstm.distribution import SequenceParallel
from keras_xlstm.ops.mlstm_chunks import in_parts, total
from keras_xlstm.ops.products import einsum

P = jax.sharding.PartitionSpec
_inside = False  # while a segment is traced


def why_not(sequence, *args, **kwargs):
    distribution = keras.distribution.distribution()
    if not isinstance(distribution, SequenceParallel):
        name = type(distribution).__name__ if distribution else "no distribution"
        return f"needs `keras_xlstm.distribution.SequenceParallel`, received {name}"
    if _inside:
        return "leaves segments to other kernels"
    shards, S = distribution.sequence_shards, sequence.shape[1]
    if not isinstance(S, int) or S % shards:
        return f"needs a length that {shards} devices can share, received {S}"


def how(*args, **kwargs):
    shards = keras.distribution.distribution().sequence_shards
    return f"in {shards} segments, a device each"


def mlstm(q, k, v, i, log_f, s, state, **options):
    def segment(sequence, state):
        before = scan_over_devices(SegmentMap.of(*sequence[1:]), state)
        h, state = serve("mlstm", *sequence, before, **options)
        return h, of_last_device(state)

    return split((q, k, v, i, log_f, s), state, segment)


def slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    B, pieces = gates.shape[0], devices()
    rows = B // keras.distribution.distribution().batch_shards or 1  # in one place
    while rows % pieces:
        pieces -= 1

    def segment(sequence, rest):
        # A piece is every `pieces`-th row, so that rows stay where they are.
        sequence, (weights, state) = (
            jax.tree.map(cut, sequence),
            (rest[0], jax.tree.map(cut, rest[1])),
        )

        def turn(carry, time):
            handed, h, ends = carry
            number = time - device()
            mine = (number >= 0) & (number < pieces)
            number = jnp.clip(number, 0, pieces - 1)
            *start, scale = jax.tree.map(lambda x: x[:, number], state)
            start = choose(device() == 0, start, list(handed))
            gates, *flags = jax.tree.map(lambda x: x[:, number], sequence)
            h_new, end = serve("slstm", gates, *weights, tuple(start), *flags, scale)

            def keep(old, new):
                return old.at[:, number].set(jnp.where(mine, new, old[:, number]))

            return (shifted(end, 1), keep(h, h_new), tuple(map(keep, ends, end))), None

        ends = state[:4]
        handed = tuple(x[:, 0] for x in ends)
        h = jnp.zeros_like(sequence[0][:, :, :, 0], dtype="float32")
        turns = jnp.arange(pieces + devices() - 1)
        (_, h, ends), _ = lax.scan(turn, (handed, h, ends), turns)
        h, ends = jax.tree.map(joined, (h, ends))
        return h, of_last_device(ends)

    def cut(x):
        return x.reshape(B // pieces, pieces, *x.shape[1:])

    def joined(x):
        return x.reshape(B, *x.shape[2:])

    rest = (recurrent_kernel, bias), (*state, recurrent_scale)
    return split((gates, mask, reset), rest, segment)


class SegmentMap(NamedTuple):
    """Of (B, NH) and of C and n, see the head of this file."""

    A: jax.Array
    M: jax.Array
    D: jax.Array
    d: jax.Array

    @classmethod
    def of(cls, k, v, i, log_f, s):
        i, log_f, s = (x.astype("float32").swapaxes(1, 2) for x in (i, log_f, s))  # (B, NH, S)
        sums = [jnp.cumsum(x, -1) for x in in_parts(log_f)]
        to_end = total([x[..., -1:] - x for x in sums])
        M = jnp.max(to_end + s, -1)
        weights = jnp.exp(to_end + i - M[..., None])
        k, v = k.astype("float32"), v.astype("float32")
        weighted = k * weights.swapaxes(1, 2)[..., None]
        D, d = einsum("bshk,bshv->bhkv", weighted, v), jnp.sum(weighted, 1)
        return cls(total([x[..., -1] for x in sums]), M, D, d)

    def after(self, state):
        C, n, m = state
        m_new = jnp.maximum(self.A + m, self.M)
        F, I = jnp.exp(self.A + m - m_new), jnp.exp(self.M - m_new)
        C = F[..., None, None] * C + I[..., None, None] * self.D
        return C, F[..., None] * n + I[..., None] * self.d, m_new

    def after_map(self, earlier):
        D, d, M = self.after((earlier.D, earlier.d, earlier.M))
        return SegmentMap(self.A + earlier.A, M, D, d)


def scan_over_devices(own, first):
    """The state before each device's segment, of the first one."""
    upto, steps = own, 1
    while steps < devices():
        earlier = shifted(upto, steps)
        joined = upto.after_map(earlier)
        upto = choose(device() >= steps, joined, upto)
        steps *= 2
    before = shifted(upto, 1).after(first)
    return choose(device() > 0, before, tuple(first))


def split(sequence, rest, function):
    """Runs `function(sequence, rest) -> h, state` on each device with its segment."""
    mesh, axis = keras.distribution.distribution().device_mesh.backend_mesh, axis_name()
    in_specs = jax.tree.map(lambda _: P(None, axis), sequence), jax.tree.map(lambda _: P(), rest)
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(P(None, axis), P()),
        axis_names={axis},
        check_vma=False,  # loops in the kernels start from constants
    )
    return run(sequence, rest)


def serve(op, *args, **kwargs):
    with _at_work(), kernels.use("auto", op):
        return kernels.choose(op, "auto", args, kwargs).run(*args, **kwargs)


@contextlib.contextmanager
def _at_work():
    global _inside
    _inside = True
    try:
        yield
    finally:
        _inside = False


# Devices along the axis


def axis_name():
    return keras.distribution.distribution().sequence_dim_name


def devices():
    return keras.distribution.distribution().sequence_shards


def device():
    return lax.axis_index(axis_name())


def shifted(tree, steps):
    """What the device `steps` before this one has; zeros where there is none."""
    pairs = [(number, number + steps) for number in range(devices() - steps)]
    return jax.tree.map(lambda x: lax.ppermute(x, axis_name(), pairs), tree)


def of_last_device(tree):
    is_last = device() == devices() - 1
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_last, x, 0), axis_name()), tree)


def choose(condition, yes, no):
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)
