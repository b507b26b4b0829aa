"""Products with weights, and the loss at their end: where most of a language model's time goes.

The plain kernels are Keras' own; a backend registers others where those are slow. A kernel of the
operation "linear" is `kernel(x, weights)`: x (..., D), weights (D, N) -> (..., N). A kernel of
"cross_entropy" is `kernel(logits, targets)`: logits (..., V), targets (...) int32 -> (...).
"""

import keras
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.distribution import SequenceParallel


def linear(x, weights, *, kernel="auto"):
    """`x @ weights`: x (..., D), weights (D, N) -> (..., N)."""
    x, weights = ops.convert_to_tensor(x), ops.convert_to_tensor(weights)
    lead = ops.shape(x)[:-1]
    if apart := wants_rows(x):
        x = ops.reshape(x, (-1, x.shape[-1]))
    y = kernels.choose("linear", kernel, (x, weights), {}).run(x, weights)
    return ops.reshape(y, (*lead, y.shape[-1])) if apart else y


def wants_rows(x):
    """Whether leading axes are made one: XLA transposes the gradient of what has several.

    Unless steps are split over devices: rows of one device would then not lie together.
    """
    if keras.backend.backend() != "jax" or len(x.shape) < 3:
        return False
    return not isinstance(keras.distribution.distribution(), SequenceParallel)


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
