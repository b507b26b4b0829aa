import keras

from keras_xlstm.ops.linear import linear


@keras.saving.register_keras_serializable("keras_xlstm")
class Dense(keras.layers.Dense):
    """`keras.layers.Dense` with the backend's fastest product, see `keras_xlstm/ops/linear.py`.

    Example:

    ```python
    Dense(8)(keras.random.normal((2, 16)))
    ```
    """

    def build(self, input_shape):
        super().build(input_shape)
        # Quantized already when it is built: it will get saved weights, which are calibrated.
        self.is_gptq_calibrated = self.quantization_mode == "gptq"
        self.is_awq_calibrated = self.quantization_mode == "awq"

    def call(self, inputs, training=None):
        x = linear(inputs, self.kernel)
        if self.bias is not None:
            x = keras.ops.add(x, self.bias)
        return x if self.activation is None else self.activation(x)

    # GPTQ and AWQ watch `call` to calibrate, and Keras 3.15 would not come by there.

    def _gptq_call(self, inputs, training=False):
        return (super()._gptq_call if self.is_gptq_calibrated else self.call)(inputs, training)

    def _awq_call(self, inputs, training=False):
        return (super()._awq_call if self.is_awq_calibrated else self.call)(inputs, training)

    def _get_kernel_with_merged_lora(self):
        kernel, scale, zero = super()._get_kernel_with_merged_lora()
        if self.quantization_mode in ("gptq", "awq"):  # Keras 3.15 would save no zero points
            zero = self.kernel_zero
        return kernel, scale, zero

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras leaves subclasses out: it cannot know what their `call` does. Ours does the same.
        super().quantize(mode, type_check=type_check and type(self) is not Dense, config=config)


@keras.saving.register_keras_serializable("keras_xlstm")
class GateProjection(Dense):
    """The projection to exponential gates, which stays as it is when a model is quantized."""


@keras.saving.register_keras_serializable("keras_xlstm")
class TokenEmbedding(keras.layers.ReversibleEmbedding):
    """`keras.layers.ReversibleEmbedding`, whose way back is such a product too."""

    def call(self, inputs, reverse=False):
        if not reverse or self.reverse_dtype is not None or self.logit_soft_cap is not None:
            return super().call(inputs, reverse)
        tied = self.tie_weights
        return linear(
            inputs, keras.ops.transpose(self.embeddings) if tied else self.reverse_embeddings
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        return layer_call  # a look-up keeps nothing

    # Weights only: rounded inputs of the way back would let no gradient through to adapters.

    def _int8_build(self, embeddings_shape, config=None):
        super()._int8_build(embeddings_shape, config)
        self.inputs_quantizer = None

    def _int4_build(self, embeddings_shape, config=None):
        super()._int4_build(embeddings_shape, config)
        self.inputs_quantizer = None

    def quantize(self, mode=None, type_check=True, config=None):
        subclass = type(self) is not TokenEmbedding
        super().quantize(mode, type_check=type_check and subclass, config=config)
