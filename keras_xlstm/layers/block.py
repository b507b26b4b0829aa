"""What all blocks share: residual branches over (B, S, D) with a state to go on from."""

import keras
from keras import ops
from keras.src import backend

from keras_xlstm import kernels
from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.layers.dense import Dense
from keras_xlstm.ops.checks import (
    as_flags,
    check_kernel,
    check_positive,
    check_positive_int,
    check_shapes,
    check_state,
    is_int,
)


class Block(Composite):
    """A residual block with a state: a list of float32 tensors, see `get_initial_state`.

    Subclasses give `op`, `build`, `state_shapes` and `mix`.

    Call arguments:
        x: float tensor, (B, S, D).
        initial_state: the block's state before the first step, or `None` for the initial one.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step.
        return_state: bool, whether to return `(y, state)`.
    """

    takes_flat_state = False

    def __init__(self, num_blocks=1, block_index=0, norm_epsilon=1e-6, kernel="auto", **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(num_blocks=num_blocks)
        if not is_int(block_index) or not 0 <= block_index < num_blocks:
            raise ValueError(
                "`block_index` must be an integer from 0 to num_blocks - 1. "
                f"Received: block_index={block_index!r}, num_blocks={num_blocks}."
            )
        check_positive(norm_epsilon=norm_epsilon)
        check_kernel(kernel)
        self.num_blocks, self.block_index = num_blocks, block_index
        self.norm_epsilon, self.kernel = norm_epsilon, kernel
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.supports_masking = True

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape)

    def call(self, x, initial_state=None, mask=None, reset=None, return_state=False, training=None):
        if mask is None:  # Keras fills the mask in only where no other tensor is passed
            mask = backend.get_keras_mask(x)
        x = ops.cast(x, self.compute_dtype)
        mask, reset = as_flags(mask=mask, reset=reset)
        check_shapes(x=(x, "B S D"), mask=(mask, "B S"), reset=(reset, "B S"))
        self.check(x.shape[0], initial_state)
        if initial_state is None:
            initial_state = self.get_initial_state(ops.shape(x)[0])
        y, state = self.mix(x, list(initial_state), mask=mask, reset=reset)
        return (y, state) if return_state else y

    def check(self, batch_size, initial_state, name="initial_state"):
        """Raises `ValueError` where a call would: of a state that is not this block's, or a kernel
        that there is not."""
        kernels.check_name(self.op, self.kernel)
        if initial_state is not None:
            check_state(initial_state, self.state_shapes, batch_size, self.takes_flat_state, name)

    @property
    def state_shapes(self):
        """A dict from the names of the state's tensors, in order, to their shapes in each row."""
        raise NotImplementedError

    def get_initial_state(self, batch_size):
        """The state before the first step: a list of float32 zeros with `batch_size` rows."""
        return [ops.zeros((batch_size, *shape), "float32") for shape in self.state_shapes.values()]

    def mix(self, x, state, mask, reset):
        """x in the compute dtype and the state -> y of the same shape, and the next state."""
        raise NotImplementedError

    def compute_mask(self, x, previous_mask):
        return previous_mask

    def _dense(self, width, name, initializer, input_width):
        layer = Dense(
            width,
            use_bias=False,
            kernel_initializer=initializer,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, input_width))
        return layer

    def get_config(self):
        return super().get_config() | {
            "num_blocks": self.num_blocks,
            "block_index": self.block_index,
            "norm_epsilon": self.norm_epsilon,
            "kernel": self.kernel,
        }


def check_conv_kernel_size(conv_kernel_size):
    if not is_int(conv_kernel_size) or conv_kernel_size < 0:
        raise ValueError(
            "`conv_kernel_size` must be a positive integer, or 0 for no convolution. "
            f"Received: conv_kernel_size={conv_kernel_size!r}."
        )


def round_up(width, multiple):
    """The least multiple of `multiple` that is at least `width`."""
    return -int(-width // multiple) * multiple
