"""Kernels for TensorFlow that XLA compiles, with gradients written out in `keras_xlstm/ops`.

Compiled also where the caller is not, forward and backward each once for a new shape. A batch size
that is unknown when the function is traced is known to XLA by the time it compiles. Second
derivatives are TensorFlow's own, of the plain forms.
"""

import functools
import sys

import tensorflow as tf

from keras_xlstm.ops import mlstm_chunks, slstm_loop
from keras_xlstm.ops.mlstm import chunkwise as plain_mlstm
from keras_xlstm.ops.slstm import slstm_scan as plain_slstm

compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


def why_not(sequence, *args, **kwargs):
    if not tf.executing_eagerly() and is_exporting():
        return "leaves a graph to export to the plain form: only TensorFlow could run XLA's"
    # XLA could not bound the loop of the backward pass.
    if sequence.shape[1] is None:
        return f"needs a length that is known when it is traced, received {sequence.shape[1]}"


def is_exporting():
    """Whether Keras traces this for `Model.export`, which leaves no other mark than its frame."""
    frame = sys._getframe()
    while frame and not frame.f_globals.get("__name__", "").startswith("keras.src.export"):
        frame = frame.f_back
    return frame is not None


def how(q, k, v, *args, chunk_size, eps):
    return str(mlstm_chunks.Chunks.of(q, v, chunk_size))


def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    chunks = mlstm_chunks.Chunks.of(q, v, chunk_size)
    options = chunks.L, chunks.G, eps
    h, *ends = differentiable(
        lambda tensors: _mlstm(*options, tensors),
        lambda *args: _mlstm_gradient(*options, *args),
        lambda *tensors: _plain_mlstm(chunks.L, eps, *tensors),
    )(q, k, v, i, log_f, s, *state)
    return of_shapes(h, [*q.shape[:3], v.shape[-1]], ends, state)


# Of numbers and tensors only: for other objects, TensorFlow would trace anew at each call.


@compiled
def _mlstm(L, G, eps, tensors):
    return mlstm_chunks.forward(mlstm_chunks.Chunks(L, G), eps, *tensors)


@compiled
def _mlstm_gradient(L, G, eps, tensors, outputs, kept, d_outputs):
    chunks = mlstm_chunks.Chunks(L, G)
    return mlstm_chunks.backward(chunks, eps, tensors, outputs, kept, *d_outputs)


def _plain_mlstm(L, eps, q, k, v, i, log_f, s, *state):
    h, state = plain_mlstm(q, k, v, i, log_f, s, state, chunk_size=L, eps=eps)
    return h, *state


def slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    scale = [] if recurrent_scale is None else [recurrent_scale]
    h, *ends = differentiable(
        lambda tensors: _slstm(mask, reset, tensors),
        lambda tensors, _, kept, d_outputs: _slstm_gradient(mask, reset, tensors, kept, d_outputs),
        lambda *tensors: _plain_slstm(mask, reset, *tensors),
    )(gates, recurrent_kernel, bias, *state, *scale)
    B, S, _, *heads = gates.shape
    return of_shapes(h, [B, S, *heads], ends, state)


def of_shapes(h, shape, ends, state):
    """What a compiled function returned, which may have been traced for batches of any size."""
    h.set_shape(shape)
    for end, start in zip(ends, state, strict=True):
        end.set_shape(start.shape)
    return h, tuple(ends)


def _slstm_inputs(mask, reset, tensors):
    gates, recurrent_kernel, bias, *state = tensors
    return gates, recurrent_kernel, bias, state[:4], mask, reset, *(state[4:] or [None])


@compiled
def _slstm(mask, reset, tensors):
    (h, state), kept = slstm_loop.forward(scan, *_slstm_inputs(mask, reset, tensors))
    return (h, *state), kept


@compiled
def _slstm_gradient(mask, reset, tensors, kept, d_outputs):
    inputs = _slstm_inputs(mask, reset, tensors)
    *d_weights, d_state, d_scale = slstm_loop.backward(
        scan, inputs, kept, d_outputs[0], d_outputs[1:]
    )
    return *d_weights, *d_state, *([] if d_scale is None else [d_scale])


def _plain_slstm(mask, reset, *tensors):
    h, state = plain_slstm(*_slstm_inputs(mask, reset, tensors))
    return h, *state


def differentiable(forward, backward, plain):
    """A function of tensors, from compiled ones.

    Args:
        forward: callable, `tensors -> outputs, what backward keeps`.
        backward: callable, `(tensors, outputs, kept, d_outputs) -> gradients`.
        plain: callable, the same function for TensorFlow to differentiate twice.
    """

    @tf.custom_gradient
    def function(*tensors):
        # Constants, else an eager tape would look into the compiled function too.
        outputs, kept = forward([tf.stop_gradient(x) for x in tensors])

        @tf.custom_gradient
        def gradient(*both):
            constants = [tf.stop_gradient(x) for x in both]
            inputs, d_outputs = constants[: len(tensors)], constants[len(tensors) :]
            gradients = backward(inputs, outputs, kept, d_outputs)
            return gradients, lambda *dd: second_order(both, dd)

        def second_order(both, dd):
            both = [tf.identity(x) for x in both]  # a tensor that came twice is two variables
            with tf.GradientTape() as outer:
                outer.watch(both)
                inputs, d_outputs = both[: len(tensors)], both[len(tensors) :]
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    outputs = plain(*inputs)
                first = inner.gradient(outputs, inputs, d_outputs, unconnected_gradients="zero")
            return outer.gradient(first, both, dd, unconnected_gradients="zero")

        return outputs, lambda *d_outputs: gradient(*tensors, *d_outputs)

    return function


def scan(body, state, inputs, reverse=False):
    """`jax.lax.scan` as a loop that XLA runs in place."""
    length = next(x for x in tf.nest.flatten(inputs) if x is not None).shape[0]

    def at(t):
        return tf.nest.map_structure(lambda x: None if x is None else x[t], inputs)

    _, first = body(state, at(0))  # for its structure, and then pruned
    arrays = [
        tf.TensorArray(x.dtype, length, element_shape=x.shape) for x in tf.nest.flatten(first)
    ]

    def step(number, state, arrays):
        t = length - 1 - number if reverse else number
        state, outputs = body(state, at(t))
        outputs = tf.nest.flatten(outputs)
        return number + 1, state, [a.write(t, x) for a, x in zip(arrays, outputs, strict=True)]

    _, state, arrays = tf.while_loop(
        lambda number, *_: number < length,
        step,
        (0, state, arrays),
        maximum_iterations=length,
    )
    return state, tf.nest.pack_sequence_as(first, [a.stack() for a in arrays])
