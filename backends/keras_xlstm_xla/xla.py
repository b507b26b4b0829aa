"""The chunkwise mLSTM for TensorFlow: `keras_xlstm/ops/mlstm_chunks.py`.

Compiled by XLA also where the caller is not, forward and backward each once for a new shape. A
batch size that is unknown when the function is traced is known to XLA by the time it compiles.
"""

import functools

import tensorflow as tf

from keras_xlstm.ops.mlstm import chunkwise
from keras_xlstm.ops.mlstm_chunks import Chunks, backward, forward

compiled = functools.partial(tf.function, jit_compile=True, autograph=False)


def why_not(q, *args, **kwargs):
    # XLA could not bound the loop of the backward pass.
    return "needs a length that is known when it is traced" if q.shape[1] is None else None


def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    chunks = Chunks.of(q, v, chunk_size, scan)

    @tf.custom_gradient
    def outputs(*inputs):
        # Constants, else an eager tape would look into the compiled function too.
        outputs, kept = _forward(chunks.L, chunks.G, eps, *map(tf.stop_gradient, inputs))
        return outputs, lambda *d_outputs: gradient(inputs, d_outputs, kept)

    def gradient(inputs, d_outputs, kept):
        @tf.custom_gradient
        def first_order(*tensors):
            constants = map(tf.stop_gradient, tensors)
            gradients = _backward(chunks.L, chunks.G, eps, kept, *constants)
            return gradients, lambda *dd: _second_order(chunks.L, eps, tensors, dd)

        return first_order(*inputs, *d_outputs)

    h, *state = outputs(q, k, v, i, log_f, s, *state)
    return h, tuple(state)


# Of numbers and tensors only: for another object of its own, TensorFlow would trace anew each time.


@compiled
def _forward(L, G, eps, *inputs):
    return forward(Chunks(L, G, scan), eps, *inputs)


@compiled
def _backward(L, G, eps, kept, *tensors):
    return backward(Chunks(L, G, scan), eps, tensors[:9], kept, *tensors[9:])


@compiled
def _second_order(L, eps, tensors, dd):
    """The gradient's own gradient, which TensorFlow derives from the plain chunkwise form."""
    inputs, d_outputs = tensors[:9], tensors[9:]
    with tf.GradientTape() as outer:
        outer.watch(tensors)
        with tf.GradientTape() as inner:
            inner.watch(inputs)
            h, state = chunkwise(*inputs[:6], inputs[6:], chunk_size=L, eps=eps)
        gradients = inner.gradient((h, *state), inputs, d_outputs, unconnected_gradients="zero")
    return outer.gradient(gradients, tensors, dd, unconnected_gradients="zero")


def scan(body, state, inputs, reverse=False):
    """`jax.lax.scan` as a loop that XLA runs in place."""
    length = inputs[0].shape[0]
    _, first = body(state, [x[0] for x in inputs])  # for its structure, and then pruned
    outputs = [tf.TensorArray(x.dtype, length, element_shape=x.shape) for x in first]

    def step(number, state, outputs):
        t = length - 1 - number if reverse else number
        state, new = body(state, [x[t] for x in inputs])
        return number + 1, state, [a.write(t, x) for a, x in zip(outputs, new, strict=True)]

    _, state, outputs = tf.while_loop(
        lambda number, *_: number < length,
        step,
        (0, state, outputs),
        maximum_iterations=length,
    )
    return state, [a.stack() for a in outputs]
