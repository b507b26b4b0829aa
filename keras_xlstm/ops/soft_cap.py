from keras import ops

from keras_xlstm import kernels
from keras_xlstm.ops.checks import as_tensor, check_cap


def soft_cap(x, cap):
    """Squashes `x` smoothly into (-cap, cap): `cap * tanh(x / cap)`.

    Args:
        x: float tensor.
        cap: positive float, or `None` for no cap.

    Returns:
        A tensor of the shape and dtype of `x`.

    Source: Beck et al. 2025, arXiv:2503.13427: 15 for the gates, 30 for the logits.

    Example:

    ```python
    soft_cap(keras.ops.array([0.0, 1e9]), 15.0)  # [0., 15.]
    ```
    """
    if cap is None:
        return x
    check_cap(cap=cap)
    args = as_tensor("x", x), cap
    return kernels.choose("soft_cap", "auto", args, {}).run(*args)


kernels.define("soft_cap", lambda x, cap: ((x, cap), {}))
kernels.register("keras", lambda x, cap: cap * ops.tanh(x / cap), op="soft_cap")
