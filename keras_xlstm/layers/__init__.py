"""Layers, one a file: the sequence layers and their cells, the blocks, and their parts."""

from keras_xlstm.layers.block_stack import XLSTMBlockStack
from keras_xlstm.layers.causal_conv1d import CausalConv1D
from keras_xlstm.layers.feed_forward import GatedFeedForward
from keras_xlstm.layers.headwise_dense import HeadwiseDense
from keras_xlstm.layers.initializers import Linspace, PowerlawForgetBias
from keras_xlstm.layers.large_block import XLSTMLargeBlock
from keras_xlstm.layers.mlstm import MLSTM, MLSTMCell
from keras_xlstm.layers.mlstm_block import MLSTMBlock
from keras_xlstm.layers.multi_head_norm import MultiHeadNorm
from keras_xlstm.layers.slstm import SLSTM, SLSTMCell, SLSTMRecurrence
from keras_xlstm.layers.slstm_block import SLSTMBlock
from keras_xlstm.layers.zero_centered_layer_norm import ZeroCenteredLayerNorm

__all__ = [
    "MLSTM",
    "SLSTM",
    "CausalConv1D",
    "GatedFeedForward",
    "HeadwiseDense",
    "Linspace",
    "MLSTMBlock",
    "MLSTMCell",
    "MultiHeadNorm",
    "PowerlawForgetBias",
    "SLSTMBlock",
    "SLSTMCell",
    "SLSTMRecurrence",
    "XLSTMBlockStack",
    "XLSTMLargeBlock",
    "ZeroCenteredLayerNorm",
]
