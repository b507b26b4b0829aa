"""The step of a language model that continues texts, called once for every token.

A kernel of the operation "decode" is `kernel(model)`. It runs once a generation and returns
`step(token_ids, cache)`, which gives what `model.call_with_cache` gives for token ids (B, 1). JAX
and TensorFlow compile the loop around the step, so that `"plain"` is all they need.
"""

from keras_xlstm import kernels


def decoder(model):
    """The step of `model`, by the fastest kernel that can serve it."""
    return kernels.choose("decode", "auto", (model,), {}).run(model)


kernels.define("decode", lambda model: ((model,), {}))
kernels.register("plain", lambda model: model.call_with_cache, op="decode")
