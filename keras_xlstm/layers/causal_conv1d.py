import keras
from keras import ops as kops

from keras_xlstm import ops
from keras_xlstm.layers.composite import features_spec
from keras_xlstm.ops.checks import check_positive_int


@keras.saving.register_keras_serializable("keras_xlstm")
class CausalConv1D(keras.layers.Layer):
    """A depthwise causal convolution over time that honours masks and resets.

    Maps (B, S, D) to (B, S, D), see `keras_xlstm.ops.causal_conv1d`.

    Args:
        kernel_size: int, steps in the window, the current one included.
        use_bias: bool.

    Call arguments:
        x: float tensor, (B, S, D).
        initial_state: float32 tensor, (B, kernel_size - 1, D), the inputs before the first step,
            or `None` for zeros.
        mask, reset: bool tensors, (B, S), or `None`.
        return_state: bool, whether to return `(y, state)`.

    Example:

    ```python
    CausalConv1D(4)(keras.random.normal((2, 10, 16)))
    ```
    """

    def __init__(self, kernel_size=4, use_bias=True, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(kernel_size=kernel_size)
        self.kernel_size, self.use_bias = kernel_size, use_bias
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape)
        D, K = input_shape[-1], self.kernel_size
        limit = K**-0.5  # a depthwise window has K inputs

        def uniform(shape, name):  # an initializer each: one would draw the same numbers twice
            initializer = keras.initializers.RandomUniform(-limit, limit)
            return self.add_weight(shape=shape, initializer=initializer, name=name)

        self.kernel = uniform((K, D), "kernel")
        self.bias = uniform((D,), "bias") if self.use_bias else None

    def get_initial_state(self, batch_size):
        return kops.zeros((batch_size, self.kernel_size - 1, self.kernel.shape[-1]), "float32")

    def call(self, x, initial_state=None, mask=None, reset=None, return_state=False):
        return ops.causal_conv1d(
            kops.cast(x, self.compute_dtype),
            self.kernel,
            self.bias,
            initial_state=initial_state,
            mask=mask,
            reset=reset,
            return_state=return_state,
        )

    def get_config(self):
        config = {"kernel_size": self.kernel_size, "use_bias": self.use_bias}
        return super().get_config() | config
