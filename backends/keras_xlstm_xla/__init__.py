"""Kernels for the TensorFlow backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm.ops.mlstm import step_by_step
    from keras_xlstm_xla import xla

    kernels.register("xla", xla.mlstm, xla.why_not, priority=10, how=xla.how)
    kernels.register("xla", xla.slstm, xla.why_not, op="slstm", priority=10, how=step_by_step)
