"""Kernels for the torch backend, found by entry point."""

from keras_xlstm import kernels


def register_kernels():
    from keras_xlstm.ops.mlstm import step_by_step
    from keras_xlstm_triton import (
        eager_linear,
        eager_mlstm,
        eager_slstm,
        mlstm,
        mlstm_decode,
        slstm,
        traced,
    )
    from keras_xlstm_triton.eager_linear import why_not

    step = mlstm_decode.step, mlstm_decode.why_not
    kernels.register("triton-step", *step, priority=110, how=mlstm_decode.how)
    kernels.register("triton", mlstm.mlstm, mlstm.why_not, priority=20, how=mlstm.how)
    kernels.register("torch", eager_mlstm.mlstm, why_not, priority=10, how=eager_mlstm.how)
    kernels.register("triton", slstm.slstm, slstm.why_not, op="slstm", priority=20, how=slstm.how)
    kernels.register("torch", eager_slstm.slstm, why_not, op="slstm", priority=10, how=step_by_step)
    kernels.register(
        "onednn", eager_linear.linear, eager_linear.why_not_linear, op="linear", priority=10
    )
    kernels.register("torch", eager_linear.soft_cap, why_not, op="soft_cap", priority=10)
    kernels.register("torch", eager_linear.cross_entropy, why_not, op="cross_entropy", priority=10)
    kernels.register("torch", eager_linear.normalize, why_not, op="normalize", priority=10)
    kernels.register(
        "torch",
        eager_linear.rms_normalize,
        eager_linear.why_not_rms_normalize,
        op="rms_normalize",
        priority=10,
    )
    kernels.register("traced", traced.repeated, traced.why_not, op="repeated", priority=10)
