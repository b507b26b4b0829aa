import keras


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
