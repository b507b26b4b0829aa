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


kernels.define("normalize", lambda x, eps: ((x, eps), {}))
kernels.register("keras", _normalize, op="normalize")
