"""The mathematics, in plain `keras.ops`: read it beside the papers."""

# Operations that have kernels, beside those below.
from keras_xlstm.ops import linear, normalize, repeated  # noqa: F401
from keras_xlstm.ops.causal_conv import causal_conv1d
from keras_xlstm.ops.masks import segment_starts
from keras_xlstm.ops.mlstm import (
    mlstm,
    mlstm_chunkwise,
    mlstm_parallel,
    mlstm_recurrent,
    mlstm_step,
    mlstm_zero_state,
)
from keras_xlstm.ops.slstm import slstm, slstm_step, slstm_zero_state
from keras_xlstm.ops.soft_cap import soft_cap

__all__ = [
    "causal_conv1d",
    "mlstm",
    "mlstm_chunkwise",
    "mlstm_parallel",
    "mlstm_recurrent",
    "mlstm_step",
    "mlstm_zero_state",
    "segment_starts",
    "slstm",
    "slstm_step",
    "slstm_zero_state",
    "soft_cap",
]
