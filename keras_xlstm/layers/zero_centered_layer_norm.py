import keras
from keras import ops

from keras_xlstm.ops.checks import check_positive


@keras.saving.register_keras_serializable("keras_xlstm")
class ZeroCenteredLayerNorm(keras.layers.Layer):
    """Layer normalization without a bias whose scale is kept as its difference from 1.

    So the scale is exact near 1 also in bfloat16, and weight decay draws it to 1.

    Args:
        epsilon: float, added to the variance.

    Source: the published code of Beck et al. 2024, arXiv:2405.04517.

    Example:

    ```python
    ZeroCenteredLayerNorm()(keras.random.normal((2, 10, 16)))
    ```
    """

    def __init__(self, epsilon=1e-6, **kwargs):
        super().__init__(**kwargs)
        check_positive(epsilon=epsilon)
        self.epsilon = epsilon
        self.input_spec = keras.layers.InputSpec(min_ndim=1)
        self.supports_masking = True

    def build(self, input_shape):
        self.input_spec = keras.layers.InputSpec(min_ndim=1, axes={-1: input_shape[-1]})
        self.gamma = self.add_weight(
            shape=(input_shape[-1],), initializer="zeros", name="gamma", autocast=False
        )

    def call(self, x):
        scale = 1 + ops.cast(self.gamma, "float32")
        y = ops.layer_normalization(x, gamma=scale, axis=-1, epsilon=self.epsilon)
        return ops.cast(y, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"epsilon": self.epsilon}
