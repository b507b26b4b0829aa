"""Kernels for the TensorFlow backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm_xla.chunkwise import mlstm_chunkwise, why_not

    kernels.register("xla", mlstm_chunkwise, why_not, priority=10)
