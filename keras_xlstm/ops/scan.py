import math

from keras import ops, tree
from keras.src import backend


def scan(body, state, inputs):
    """A loop over the first axis of `inputs`: the one inside `keras.layers.RNN`.

    `keras.ops.scan` will not do: under TensorFlow its outputs must have the shapes of the state,
    lengths must be known when it is traced, and XLA finds no bound for its backward pass.

    Args:
        body: callable, `(state, inputs of one step) -> next state, outputs`.
        state: tuple of tensors.
        inputs: tuple of tensors, (S, B, ...), of at least three axes, S >= 1.

    Returns:
        The last state, and the outputs of all steps, stacked along a new first axis.
    """

    def step(inputs, state):
        state, outputs = body(tuple(state), inputs)
        return outputs, list(state)

    S = inputs[0].shape[0]
    if S == 1:  # no loop: decoding is this, and not every export format has loops
        state, outputs = body(tuple(state), tuple(x[0] for x in inputs))
        return tuple(state), tree.map_structure(lambda x: x[None], outputs)
    if S is not None:
        _, outputs, state = backend.rnn(
            step, tuple(inputs), list(state), time_major=True, input_length=S
        )
        return tuple(state), outputs

    # A length that is not yet known is taken of one tensor only.
    packed, unpack = _pack(inputs)
    _, outputs, state = backend.rnn(
        lambda x, state: step(unpack(x), state), ops.swapaxes(packed, 0, 1), list(state)
    )
    return tuple(state), tree.map_structure(lambda x: ops.swapaxes(x, 0, 1), outputs)


def _pack(inputs):
    """Tensors (S, B, ...) side by side in one, (S, B, width), and the way back from a step."""
    S, B = ops.shape(inputs[0])[:2]
    widths = [math.prod(x.shape[2:]) for x in inputs]
    flat = [
        ops.cast(ops.reshape(x, (S, B, width)), "float32")
        for x, width in zip(inputs, widths, strict=True)
    ]

    def unpack(packed):
        parts, start = [], 0
        for x, width in zip(inputs, widths, strict=True):
            part = ops.reshape(packed[:, start : start + width], (-1, *x.shape[2:]))
            parts.append(ops.cast(part, x.dtype))
            start += width
        return tuple(parts)

    return ops.concatenate(flat, axis=-1), unpack
