import keras
from keras import ops

from keras_xlstm.ops.checks import check_positive
from keras_xlstm.ops.normalize import normalize


@keras.saving.register_keras_serializable("keras_xlstm")
class MultiHeadNorm(keras.layers.Layer):
    """Layer normalization of each head by itself: centred, scaled, without a bias.

    Maps (..., NH, DH) to the same shape, in the compute dtype; reduced in float32.

    Args:
        epsilon: float, added to the variance.
        zero_centered: bool, whether the scale is kept as its difference from 1.

    Source: Beck et al. 2025, arXiv:2503.13427; the "group norm" of arXiv:2405.04517.

    Example:

    ```python
    MultiHeadNorm()(keras.random.normal((2, 10, 4, 16)))
    ```
    """

    def __init__(self, epsilon=1e-6, zero_centered=False, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.epsilon, self.zero_centered = epsilon, zero_centered
        check_positive(epsilon=epsilon)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape):
        NH, DH = input_shape[-2:]
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-2: NH, -1: DH})
        self.scale = self.add_weight(
            shape=(NH, DH),
            initializer="zeros" if self.zero_centered else "ones",
            name="scale",
            autocast=False,
        )

    def call(self, x):
        x = ops.cast(x, "float32")
        scale = ops.cast(self.scale, "float32")
        x = normalize(x, self.epsilon) * (1 + scale if self.zero_centered else scale)
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {"epsilon": self.epsilon, "zero_centered": self.zero_centered}
        return super().get_config() | config
