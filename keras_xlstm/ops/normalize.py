from keras import ops

from keras_xlstm import kernels


def normalize(x, eps):
    """Centres `x` over its last axis and scales it to variance 1; `eps` is added to the variance.

    A kernel of the operation "normalize" has the same arguments.
    """
    return kernels.choose("normalize", "auto", (x, eps), {}).run(x, eps)


def _normalize(x, eps):
    x = x - ops.mean(x, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(x), axis=-1, keepdims=True)
    return x * ops.rsqrt(variance + eps)


def rms_normalize(x, scale, eps):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32 or more.

    A kernel of the operation "rms_normalize" has the same arguments.
    """
    args = x, ops.convert_to_tensor(scale), eps
    return kernels.choose("rms_normalize", "auto", args, {}).run(*args)


def _rms_normalize(x, scale, eps):
    return ops.rms_normalization(x, scale, axis=-1, epsilon=eps)


kernels.define("normalize", lambda x, eps: ((x, eps), {}))
kernels.register("keras", _normalize, op="normalize")
kernels.define("rms_normalize", lambda x, scale, eps: ((x, scale, eps), {}))
kernels.register("keras", _rms_normalize, op="rms_normalize")
