"""Functions that a model calls over and over while it continues texts.

Such a function is `function(token_ids, cache, padding_mask=None) -> (*tensors, cache)`, where a
cache is a list of lists of tensors, or `None` before the first token. A kernel of the operation
"repeated" is `kernel(function, model)`. It is asked once a generation, during which no weight
changes, and returns a function that gives the same. JAX and TensorFlow compile all of a
generation, so that `"plain"` is all they need.
"""

from keras_xlstm import kernels


def repeated(function, model):
    """`function` of `model`, in the form that is the fastest to call often."""
    return kernels.choose("repeated", "auto", (function, model), {}).run(function, model)


kernels.define("repeated", lambda function, model: ((function, model), {}))
kernels.register("plain", lambda function, model: function, op="repeated")
