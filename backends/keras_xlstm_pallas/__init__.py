"""Kernels for the JAX backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm_pallas import sequence, xla

    kernels.register("xla", xla.mlstm, xla.why_not, priority=10, how=xla.how)
    kernels.register("xla", xla.slstm, xla.why_not, op="slstm", priority=10)
    for op, kernel in (("mlstm", sequence.mlstm), ("slstm", sequence.slstm)):
        kernels.register("sequence", kernel, sequence.why_not, op=op, priority=30, how=sequence.how)
