import keras

from keras_xlstm import ops
from keras_xlstm.ops.checks import check_cap


@keras.saving.register_keras_serializable("keras_xlstm")
class SoftCap(keras.layers.Layer):
    """`keras_xlstm.ops.soft_cap` as a layer.

    Args:
        cap: positive float, or `None` for no cap.

    Example:

    ```python
    SoftCap(30.0)(keras.ops.array([0.0, 1e9]))  # [0., 30.]
    ```
    """

    def __init__(self, cap, **kwargs):
        super().__init__(**kwargs)
        check_cap(cap=cap)
        self.cap = cap
        self.supports_masking = True

    def call(self, x):
        return ops.soft_cap(x, self.cap)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return super().get_config() | {"cap": self.cap}
