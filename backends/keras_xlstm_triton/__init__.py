"""Kernels for the torch backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm_triton.eager_mlstm import mlstm
    from keras_xlstm_triton.eager_slstm import slstm

    kernels.register("torch", mlstm, priority=10)
    kernels.register("torch", slstm, op="slstm", priority=10)
