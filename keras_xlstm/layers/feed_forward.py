import keras

from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.layers.dense import Dense
from keras_xlstm.layers.initializers import small_init, wang_init
from keras_xlstm.ops.checks import check_positive_int
from keras_xlstm.ops.linear import rows


@keras.saving.register_keras_serializable("keras_xlstm")
class GatedFeedForward(Composite):
    """A gated feed-forward network without biases: `down(activation(gate(x)) * up(x))`.

    Maps (B, S, D) to (B, S, D).

    Args:
        intermediate_dim: int, the width between.
        activation: `"silu"` makes it a SwiGLU, `"gelu"` the network of the 2024 sLSTM block.
        num_blocks: int, blocks of the model, for the initialization of `down`.

    Example:

    ```python
    GatedFeedForward(64)(keras.random.normal((2, 10, 16)))
    ```
    """

    def __init__(self, intermediate_dim, activation="silu", num_blocks=1, **kwargs):
        super().__init__(**kwargs)
        check_positive_int(intermediate_dim=intermediate_dim, num_blocks=num_blocks)
        self.intermediate_dim, self.num_blocks = intermediate_dim, num_blocks
        self.activation = keras.activations.get(activation)
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape)
        D = input_shape[-1]

        def dense(width, name, initializer, input_shape):
            layer = Dense(
                width,
                use_bias=False,
                kernel_initializer=initializer,
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build(input_shape)
            return layer

        inner_shape = (*input_shape[:-1], self.intermediate_dim)
        self.gate = dense(self.intermediate_dim, "gate", small_init(D), input_shape)
        self.up = dense(self.intermediate_dim, "up", small_init(D), input_shape)
        self.down = dense(D, "down", wang_init(D, self.num_blocks), inner_shape)

    def call(self, x):
        shape = keras.ops.shape(x)
        x = rows(x)
        y = self.down(self.activation(self.gate(x)) * self.up(x))
        return keras.ops.reshape(y, shape)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "num_blocks": self.num_blocks,
        }
