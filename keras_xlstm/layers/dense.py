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

    def call(self, inputs, training=None):
        x = linear(inputs, self.kernel)
        if self.bias is not None:
            x = keras.ops.add(x, self.bias)
        return x if self.activation is None else self.activation(x)

    def quantize(self, mode=None, type_check=True, config=None):
        # Keras leaves subclasses out: it cannot know what their `call` does. Ours does the same.
        super().quantize(mode, type_check=type_check and type(self) is not Dense, config=config)


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

    def quantize(self, mode=None, type_check=True, config=None):
        subclass = type(self) is not TokenEmbedding
        super().quantize(mode, type_check=type_check and subclass, config=config)
