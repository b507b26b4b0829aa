"""The xLSTM for Keras 3: layers, blocks and language models on JAX, TensorFlow and PyTorch."""

import importlib

from keras_xlstm import kernels, ops

__version__ = "0.1.0"
__all__ = ["kernels", "layers", "models", "ops"]


def __getattr__(name):
    # Layers cost little and models cost seconds (they import KerasHub): each when it is named.
    if name in ("layers", "models"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
