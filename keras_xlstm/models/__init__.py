"""The xLSTM as a KerasHub language model."""

import importlib.util

if importlib.util.find_spec("keras_hub") is None:
    raise ImportError('`keras_xlstm.models` needs KerasHub: pip install "keras-xlstm[hub]"')

from keras_xlstm.models import preset_loader, presets
from keras_xlstm.models.backbone import XLSTMBackbone
from keras_xlstm.models.causal_lm import XLSTMCausalLM
from keras_xlstm.models.causal_lm_preprocessor import XLSTMCausalLMPreprocessor
from keras_xlstm.models.memory import predict_memory
from keras_xlstm.models.tokenizer import XLSTMTokenizer

preset_loader.register()
presets.register()

__all__ = [
    "XLSTMBackbone",
    "XLSTMCausalLM",
    "XLSTMCausalLMPreprocessor",
    "XLSTMTokenizer",
    "predict_memory",
]
