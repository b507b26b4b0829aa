"""What all blocks share: residual branches over (B, S, D) with a state to go on from."""

from keras import ops
from keras.src import backend

from keras_xlstm.layers.composite import Composite
from keras_xlstm.layers.dense import Dense
from keras_xlstm.ops.checks import check_positive_int


class Block(Composite):
    """A residual block with a state: a list of float32 tensors, see `get_initial_state`.

    Subclasses give `build`, `state_names`, `get_initial_state` and `mix`.

    Call arguments:
        x: float tensor, (B, S, D).
        initial_state: the block's state before the first step, or `None` for the initial one.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step.
        return_state: bool, whether to return `(y, state)`.
    """

    def __init__(self, num_blocks=1, block_index=0, norm_epsilon=1e-6, **kwargs):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(num_blocks=num_blocks)
        if not 0 <= block_index < num_blocks:
            raise ValueError(
                "`block_index` must count from 0 and lie below `num_blocks`. "
                f"Received: block_index={block_index}, num_blocks={num_blocks}."
            )
        self.num_blocks, self.block_index = num_blocks, block_index
        self.norm_epsilon = norm_epsilon
        self.supports_masking = True

    def call(self, x, initial_state=None, mask=None, reset=None, return_state=False, training=None):
        if mask is None:  # Keras fills the mask in only where no other tensor is passed
            mask = backend.get_keras_mask(x)
        x = ops.cast(x, self.compute_dtype)
        if initial_state is None:
            initial_state = self.get_initial_state(ops.shape(x)[0])
        elif len(initial_state) != len(self.state_names):
            raise ValueError(
                f"`initial_state` must hold the tensors {self.state_names}, as return_state=True "
                f"returns them. Received: {len(initial_state)} of them."
            )
        y, state = self.mix(x, list(initial_state), mask=mask, reset=reset)
        return (y, state) if return_state else y

    @property
    def state_names(self):
        """What the tensors of the state are, in order."""
        raise NotImplementedError

    def get_initial_state(self, batch_size):
        """The state before the first step: a list of float32 zeros with `batch_size` rows."""
        raise NotImplementedError

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
        }


def check_conv_kernel_size(conv_kernel_size):
    if not isinstance(conv_kernel_size, int) or conv_kernel_size < 0:
        raise ValueError(
            "`conv_kernel_size` must be a positive integer, or 0 for no convolution. "
            f"Received: conv_kernel_size={conv_kernel_size!r}."
        )


def round_up(width, multiple):
    """The least multiple of `multiple` that is at least `width`."""
    return -int(-width // multiple) * multiple
