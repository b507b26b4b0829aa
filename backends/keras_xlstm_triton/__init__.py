"""Kernels for the torch backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm_triton.eager_mlstm import mlstm_chunkwise

    kernels.register("torch", mlstm_chunkwise, priority=10)
