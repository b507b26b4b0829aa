"""Kernels for the JAX backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm.ops.mlstm import step_by_step
    from keras_xlstm_pallas import mlstm, sequence, slstm, xla

    around = {"why_not": sequence.why_not, "how": sequence.how, "priority": 30}
    kernels.register("sequence", sequence.mlstm, **around)
    kernels.register("sequence", sequence.slstm, op="slstm", **around)
    kernels.register("pallas", mlstm.mlstm, mlstm.why_not, priority=20, how=mlstm.how)
    kernels.register("pallas", slstm.slstm, slstm.why_not, op="slstm", priority=20, how=slstm.how)
    kernels.register("xla", xla.mlstm, xla.why_not, priority=10, how=xla.how)
    kernels.register("xla", xla.slstm, xla.why_not, op="slstm", priority=10, how=step_by_step)
    kernels.register("xla", xla.cross_entropy, op="cross_entropy", priority=10)
