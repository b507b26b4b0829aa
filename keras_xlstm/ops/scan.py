import math

from keras import ops


def scan(body, state, inputs):
    """`keras.ops.scan` over the first axis of `inputs`, also when its length is not yet known.

    Args:
        body: callable, `(state, inputs of one step) -> next state, outputs`; the outputs have the
            structure and the shapes of the state, which is what every backend can stack.
        state: tuple of tensors.
        inputs: tuple of tensors, (S, B, ...), float32 or bool.

    Returns:
        The last state, and the stacked outputs.
    """
    if inputs[0].shape[0] is not None or len(inputs) == 1:
        return ops.scan(body, state, inputs)

    # TensorFlow's scan takes one tensor of unknown length, and fails on several.
    S, B = ops.shape(inputs[0])[:2]
    widths = [math.prod(x.shape[2:]) for x in inputs]
    flat = [
        ops.cast(ops.reshape(x, (S, B, width)), "float32")
        for x, width in zip(inputs, widths, strict=True)
    ]

    def unpacked(state, packed):
        step, start = [], 0
        for x, width in zip(inputs, widths, strict=True):
            stop = start + width
            part = ops.reshape(packed[:, start:stop], (-1, *x.shape[2:]))
            step.append(ops.cast(part, x.dtype))
            start = stop
        return body(state, tuple(step))

    return ops.scan(unpacked, state, ops.concatenate(flat, axis=-1))
