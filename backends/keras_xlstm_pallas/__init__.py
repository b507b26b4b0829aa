"""Kernels for the JAX backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm_pallas.xla import mlstm_chunkwise

    kernels.register("xla", mlstm_chunkwise, priority=10)
