from keras import ops

from keras_xlstm.ops.checks import as_flags, as_tensor, check_shapes, check_widths
from keras_xlstm.ops.masks import steps_that_happen, take_steps


def causal_conv1d(
    x, kernel, bias=None, *, initial_state=None, mask=None, reset=None, return_state=False
):
    """A depthwise causal convolution over time, with a state to go on from.

        y[t] = bias + sum over j of kernel[K - 1 - j] x[t - j],  j = 0 ... K - 1

    Args:
        x: float tensor, (B, S, D).
        kernel: float tensor, (K, D). The last row weighs the step itself.
        bias: float tensor, (D,), or `None`.
        initial_state: float tensor, (B, K - 1, D): the inputs before the first step, oldest
            first. `None` for zeros.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen, whatever `reset`
            says there: no window sees it, and y is 0.
        reset: bool tensor, (B, S). Where it is `True`, windows do not reach behind the step.
        return_state: bool, whether to return the state after the last step.

    Returns:
        y, (B, S, D) in the dtype of x; with `return_state` also the last K - 1 inputs that
        happened, (B, K - 1, D), float32, zero where a reset has cleared them.

    Raises:
        ValueError: if shapes do not fit each other.

    Example:

    ```python
    x = keras.random.normal((2, 10, 8))
    y, state = causal_conv1d(x, keras.random.normal((4, 8)), return_state=True)
    ```
    """
    x, kernel = as_tensor("x", x), as_tensor("kernel", kernel)
    bias = None if bias is None else as_tensor("bias", bias)
    mask, reset = as_flags(mask=mask, reset=reset)
    check_shapes(
        x=(x, "B S D"),
        kernel=(kernel, "K D"),
        bias=(bias, "D"),
        mask=(mask, "B S"),
        reset=(reset, "B S"),
    )
    K = kernel.shape[0]
    check_widths(K=K)
    if initial_state is None:
        initial_state = ops.zeros((ops.shape(x)[0], K - 1, x.shape[-1]), dtype="float32")
    else:
        initial_state = as_tensor("initial_state", initial_state)
        check_shapes(x=(x, "B S D"), initial_state=(initial_state, f"B {K - 1} D"))

    inputs = x
    if mask is not None:
        order, rank = steps_that_happen(mask)
        inputs = take_steps(x, order)
        if reset is not None:
            reset = ops.take_along_axis(ops.logical_and(reset, mask), order, axis=1)
    S = ops.shape(x)[1]
    window = ops.concatenate([ops.cast(initial_state, x.dtype), inputs], axis=1)  # K - 1 + S
    segment = None
    if reset is not None:
        resets = ops.cumsum(ops.cast(reset, "int32"), axis=1)
        segment = ops.pad(resets, [[0, 0], [K - 1, 0]])

    # Products and sums in float32, also those of the gradients, as for matrix products.
    window, kernel = ops.cast(window, "float32"), ops.cast(kernel, "float32")
    y = ops.zeros_like(x, dtype="float32")
    for j in range(K):
        tap = window[:, j : S + j]
        if segment is not None:
            same = ops.equal(segment[:, j : S + j], resets)[..., None]
            tap = ops.where(same, tap, ops.zeros_like(tap))
        y = y + tap * kernel[j]
    if bias is not None:
        y = y + ops.cast(bias, "float32")
    y = ops.cast(y, x.dtype)
    if mask is not None:
        y = take_steps(y, rank)
        y = ops.where(mask[..., None], y, ops.zeros_like(y))
    if not return_state:
        return y

    if mask is None:
        state = ops.reshape(window[:, S:], (ops.shape(x)[0], K - 1, x.shape[-1]))
    else:
        count = ops.sum(ops.cast(mask, "int32"), axis=1, keepdims=True)
        last = count + ops.arange(K - 1)  # (B, K - 1): where the state stands in the window
        state = take_steps(window, last)
    if segment is not None:
        kept = segment[:, S:] if mask is None else ops.take_along_axis(segment, last, axis=1)
        same = ops.equal(kept, ops.max(segment, axis=1, keepdims=True))[..., None]
        state = ops.where(same, state, ops.zeros_like(state))
    return y, ops.cast(state, "float32")
