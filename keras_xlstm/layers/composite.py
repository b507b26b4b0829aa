import keras

from keras_xlstm.ops.checks import is_int


class Composite(keras.layers.Layer):
    """A layer made of layers. Its config says which of those are quantized, and how."""

    def get_config(self):
        config, default = super().get_config(), self.dtype_policy
        quantized = [x for x in self._flatten_layers() if x.quantization_mode is not None]
        if quantized and not isinstance(default, keras.dtype_policies.DTypePolicyMap):
            policies = {x.path: x.dtype_policy for x in quantized}
            policies = keras.dtype_policies.DTypePolicyMap(default.name, policies)
            config["dtype"] = keras.dtype_policies.serialize(policies)
        return config


def features_spec(input_shape, ndim=3):
    """The `input_spec` of a layer that is built for (..., D): Keras refuses any other D."""
    D = input_shape[-1]
    if not is_int(D) or D < 1:
        raise ValueError(
            "`input_shape` must end in the number of features, at least 1 and known when the layer "
            f"is built. Received: input_shape={tuple(input_shape)}."
        )
    return keras.layers.InputSpec(ndim=ndim, axes={-1: D})
