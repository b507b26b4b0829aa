"""Products with weights, and the loss at their end: where most of a language model's time goes.

The plain kernels are Keras' own; a backend registers others where those are slow. A kernel of the
operation "linear" is `kernel(x, weights)`: x (..., D), weights (D, N) -> (..., N). A kernel of
"cross_entropy" is `kernel(logits, targets)`: logits (..., V), targets (...) int32 -> (...).
"""

import keras
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.distribution import SequenceParallel

ON_JAX = keras.backend.backend() == "jax"


def linear(x, weights, *, kernel="auto"):
    """`x @ weights`: x (..., D), weights (D, N) -> (..., N)."""
    x, weights = ops.convert_to_tensor(x), ops.convert_to_tensor(weights)
    flat = rows(x) if ON_JAX and len(x.shape) > 2 else x
    y = kernels.choose("linear", kernel, (flat, weights), {}).run(flat, weights)
    return y if flat is x else ops.reshape(y, (*ops.shape(x)[:-1], y.shape[-1]))


def rows(x):
    """(..., D) -> (rows, D): XLA would transpose axes that stay apart, in the backward pass.

    For layers with several products, of which LiteRT gives wrong results where axes stay apart.
    Unless steps are split over devices: rows of one device would then not lie together.
    """
    if ON_JAX and isinstance(keras.distribution.distribution(), SequenceParallel):
        return x
    return ops.reshape(x, (-1, x.shape[-1]))


def cross_entropy(logits, targets, *, kernel="auto"):
    """What each target (...) costs in nats: -log softmax(logits)[target], logits (..., V)."""
    args = ops.convert_to_tensor(logits), ops.cast(targets, "int32")
    return kernels.choose("cross_entropy", kernel, args, {}).run(*args)


def _cross_entropy(logits, targets):
    return ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)


kernels.define("linear", lambda x, weights: ((x, weights), {}))
kernels.register("keras", ops.matmul, op="linear")
kernels.define("cross_entropy", lambda logits, targets: ((logits, targets), {}))
kernels.register("keras", _cross_entropy, op="cross_entropy")
