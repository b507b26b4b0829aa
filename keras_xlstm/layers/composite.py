import keras
from keras import tree

from keras_xlstm.ops.checks import is_int


class Composite(keras.layers.Layer):
    """A layer made of layers.

    Its config says which of those are quantized, and how. Under `keras.RematScope` it is computed
    again as one, unless it `is_recomputed_in_parts`.
    """

    is_recomputed_in_parts = False
    changes_when_called = False  # a state or a seed, which must not move on twice

    def get_config(self):
        config, default = super().get_config(), self.dtype_policy
        quantized = [x for x in self._flatten_layers() if x.quantization_mode is not None]
        if quantized and not isinstance(default, keras.dtype_policies.DTypePolicyMap):
            policies = {x.path: x.dtype_policy for x in quantized}
            policies = keras.dtype_policies.DTypePolicyMap(default.name, policies)
            config["dtype"] = keras.dtype_policies.serialize(policies)
        return config

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """As in Keras, of a function of float tensors: frameworks trace flags, or refuse.

        Raises:
            ValueError: if the second computation would not be the first one again.
        """
        mode = self._remat_mode and self._remat_mode.mode
        if mode is None or (mode == "full" and self.is_recomputed_in_parts):
            return layer_call
        is_named = mode == "list_of_layers" and self.name in self._remat_mode.layer_names
        if self.changes_when_called and (mode in ("full", "larger_than") or is_named):
            raise ValueError(
                "`keras.RematScope` needs layers that can be computed again: not those with "
                "dropout, which would draw anew, nor `stateful=True`, whose state would move on "
                f"twice. Received: {self.name!r}. Create it outside of the scope."
            )
        if mode == "full":  # nothing in it twice
            for layer in self._flatten_layers(include_self=False):
                layer._remat_mode = None
        rematerialized = super().rematerialized_call

        def call(*args, **kwargs):
            leaves = tree.flatten((args, kwargs))
            places = [i for i, x in enumerate(leaves) if _has_gradient(x)]

            def function(*tensors):
                given = dict(zip(places, tensors, strict=True))
                found = [given.get(i, x) for i, x in enumerate(leaves)]
                args_, kwargs_ = tree.pack_sequence_as((args, kwargs), found)
                return layer_call(*args_, **kwargs_)

            return rematerialized(function, *args, **kwargs)(*(leaves[i] for i in places))

        return call


def _has_gradient(x):
    return keras.ops.is_tensor(x) and keras.backend.is_float_dtype(x.dtype)


def features_spec(input_shape, ndim=3):
    """The `input_spec` of a layer that is built for (..., D): Keras refuses any other D."""
    D = input_shape[-1]
    if not is_int(D) or D < 1:
        raise ValueError(
            "`input_shape` must end in the number of features, at least 1 and known when the layer "
            f"is built. Received: input_shape={tuple(input_shape)}."
        )
    return keras.layers.InputSpec(ndim=ndim, axes={-1: D})
