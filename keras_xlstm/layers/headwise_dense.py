import keras
from keras import ops

from keras_xlstm.layers.composite import features_spec
from keras_xlstm.layers.initializers import small_init
from keras_xlstm.ops.checks import check_divides, check_positive_int


@keras.saving.register_keras_serializable("keras_xlstm")
class HeadwiseDense(keras.layers.Layer):
    """A block-diagonal dense layer: each head reads its own slice of the features.

    Maps (B, S, D) to (B, S, D) with `num_heads` blocks of (D / num_heads)^2 weights.

    Args:
        num_heads: int, the number of blocks.
        use_bias: bool.
        kernel_initializer: initializer of the kernel, (NH, DH, DH). `None` for small-init of
            the whole width, the variance 2 / (5 D).

    Source: Beck et al. 2024, arXiv:2405.04517, App. A: "block-diagonal projection".

    Example:

    ```python
    HeadwiseDense(num_heads=4)(keras.random.normal((2, 10, 16)))
    ```
    """

    def __init__(self, num_heads, use_bias=False, kernel_initializer=None, **kwargs):
        super().__init__(**kwargs)
        check_positive_int(num_heads=num_heads)
        self.num_heads, self.use_bias = num_heads, use_bias
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape)
        D = input_shape[-1]
        check_divides("num_heads", self.num_heads, "input width", D)
        DH = D // self.num_heads
        self.dense = BlockDiagonal(
            "bshd,hde->bshe",
            output_shape=(None, self.num_heads, DH),
            bias_axes="he" if self.use_bias else None,
            kernel_initializer=self.kernel_initializer or small_init(D),
            dtype=self.dtype_policy,
            name="dense",
        )
        self.dense.build((None, None, self.num_heads, DH))

    def call(self, x):
        (B, S), D = ops.shape(x)[:2], x.shape[-1]
        x = ops.reshape(x, (B, S, self.num_heads, D // self.num_heads))
        return ops.reshape(self.dense(x), (B, S, D))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


class BlockDiagonal(keras.layers.EinsumDense):
    """Stays as it is when a model is quantized: its scales would be as large as small blocks."""
