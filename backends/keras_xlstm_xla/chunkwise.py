"""The chunkwise mLSTM for TensorFlow, compiled by XLA also where the caller is not.

The mathematics is the chunkwise form of `keras_xlstm/ops/mlstm.py`, which XLA fuses. Nothing but
the inputs is kept for the backward pass: it computes the forward pass again, inside the same
compiled function. Each new shape is compiled once; a batch size that is unknown when the function
is traced is known to XLA by the time it compiles.
"""

import tensorflow as tf

from keras_xlstm.ops.mlstm import chunkwise


def why_not(q, *args, **kwargs):
    # XLA could not bound the loop of the backward pass.
    return "needs a length that is known when it is traced" if q.shape[1] is None else None


def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    @tf.custom_gradient
    def run(*inputs):
        def gradient(*d_outputs):
            return _backward(inputs, d_outputs, chunk_size, eps)

        # Else an eager tape would look into the compiled function too.
        constants = [tf.stop_gradient(x) for x in inputs]
        return _forward(constants, chunk_size, eps), gradient

    h, *state = run(q, k, v, i, log_f, s, *state)
    return h, tuple(state)


def _outputs(inputs, chunk_size, eps):
    h, state = chunkwise(*inputs[:6], inputs[6:], chunk_size=chunk_size, eps=eps)
    return h, *state


_forward = tf.function(_outputs, jit_compile=True, autograph=False)


@tf.function(jit_compile=True, autograph=False)
def _backward(inputs, d_outputs, chunk_size, eps):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = _outputs(inputs, chunk_size, eps)
    return tape.gradient(outputs, inputs, d_outputs, unconnected_gradients="zero")
