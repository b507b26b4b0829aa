from keras import ops


def soft_cap(x, cap):
    """Squashes `x` smoothly into (-cap, cap): `cap * tanh(x / cap)`.

    Args:
        x: tensor.
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
    if cap <= 0:
        raise ValueError(f"`cap` must be positive, or None for no cap. Received: cap={cap}.")
    return cap * ops.tanh(x / cap)
