"""The xLSTM for Keras 3: layers, blocks and language models on JAX, TensorFlow and PyTorch."""

import importlib

from keras_xlstm import converters, distribution, inspect, kernels, layers, ops, utils

__version__ = "0.1.0"
__all__ = ["converters", "distribution", "inspect", "kernels", "layers", "models", "ops", "utils"]


def __getattr__(name):
    # KerasHub takes seconds to import: only for those who name the models.
    if name == "models":
        return importlib.import_module(f"{__name__}.models")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
