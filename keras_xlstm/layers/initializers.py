"""Initializers of the papers, where Keras has none of that name."""

import math

import keras
from keras import ops

from keras_xlstm.ops.checks import check_number, check_positive


def small_init(dim):
    """Normal with variance 2 / (5 dim): projections that read the residual stream."""
    return keras.initializers.RandomNormal(stddev=math.sqrt(2 / (5 * dim)))


def wang_init(dim, num_blocks):
    """Normal with deviation 2 / (num_blocks sqrt(dim)): projections that write to it."""
    return keras.initializers.RandomNormal(stddev=2 / (num_blocks * math.sqrt(dim)))


@keras.saving.register_keras_serializable("keras_xlstm")
class Linspace(keras.initializers.Initializer):
    """Evenly spaced from `start` to `stop`: the forget gates' bias over the heads.

    Args:
        start, stop: floats, both included.

    Example:

    ```python
    Linspace(3.0, 6.0)((4,))  # [3., 4., 5., 6.]
    ```
    """

    def __init__(self, start, stop):
        check_number(start=start, stop=stop)
        self.start, self.stop = start, stop

    def __call__(self, shape, dtype=None):
        _check_layout(shape, "NH")
        (size,) = shape
        return ops.cast(ops.linspace(self.start, self.stop, size), dtype or "float32")

    def get_config(self):
        return {"start": self.start, "stop": self.stop}


@keras.saving.register_keras_serializable("keras_xlstm")
class PowerlawForgetBias(keras.initializers.Initializer):
    """The sLSTM's bias, (4, NH, DH): the forget gate's falls from 5 to -7 within each head.

    `5 - 12 (k / (DH - 1))^exponent` for unit k; the other gates start at 0.

    Args:
        exponent: positive float. Block b of B has 0.3 + 1.3 b / (B - 1).

    Source: Beck et al. 2024, arXiv:2405.04517, and its published configuration.
    """

    def __init__(self, exponent=0.3):
        check_positive(exponent=exponent)
        self.exponent = exponent

    def __call__(self, shape, dtype=None):
        _check_layout(shape, "4, NH, DH")
        _, NH, DH = shape
        k = ops.arange(DH, dtype="float32") / max(DH - 1, 1)
        forget = ops.broadcast_to(5.0 - 12.0 * k**self.exponent, (NH, DH))
        zeros = ops.zeros_like(forget)
        return ops.cast(ops.stack([zeros, forget, zeros, zeros]), dtype or "float32")

    def get_config(self):
        return {"exponent": self.exponent}


def _check_layout(shape, layout):
    if len(shape) != len(layout.split()):
        raise ValueError(f"`shape` must be ({layout}). Received: shape={tuple(shape)}.")
