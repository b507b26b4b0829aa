import keras
from keras.src import backend

from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.layers.large_block import XLSTMLargeBlock
from keras_xlstm.layers.mlstm_block import MLSTMBlock
from keras_xlstm.layers.rms_norm import RMSNorm
from keras_xlstm.layers.slstm_block import SLSTMBlock
from keras_xlstm.layers.zero_centered_layer_norm import ZeroCenteredLayerNorm
from keras_xlstm.ops.checks import as_flags, check_positive_int, check_shapes, is_int, repr

BLOCK_STYLES = ("original", "large")


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMBlockStack(Composite):
    """A stack of xLSTM blocks and a final normalization: (B, S, D) to (B, S, D).

    Args:
        num_blocks: int.
        num_heads: int, of every block.
        slstm_at: ints, the blocks that hold an sLSTM, counted from 0; the others hold an mLSTM.
        block_style: `"original"` for `MLSTMBlock` and `SLSTMBlock` of the 2024 paper and a final
            LayerNorm, or `"large"` for `XLSTMLargeBlock` of the 7B model and a final RMSNorm.
        norm_epsilon: float, of all normalizations.
        conv_kernel_size: int, of original blocks, 0 for no convolution.
        mlstm_block, slstm_block: dicts of further arguments of the original blocks, such as
            `{"proj_factor": 1.5}` or another `num_heads`, which go before those above.
        qk_dim_factor, v_dim_factor, ffn_dim_factor, ffn_round_up_to, gate_soft_cap,
            denominator_epsilon: as in `XLSTMLargeBlock`; of large blocks.
        chunk_size, kernel: as for `keras_xlstm.ops.mlstm`; of blocks with an mLSTM.

    Call arguments:
        x: float tensor, (B, S, D).
        initial_state: the state that `return_state=True` returned, or `None` to begin anew.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen.
        reset: bool tensor, (B, S). Where it is `True` all states are cleared before the step.
        return_state: bool, whether to return `(y, state)`, the state a list of each block's
            list of float32 tensors.

    Source: Beck et al. 2024, arXiv:2405.04517, Sec. 2.4; Beck et al. 2025, arXiv:2503.13427.

    Example:

    ```python
    stack = XLSTMBlockStack(num_blocks=3, num_heads=2, slstm_at=(1,))
    x = keras.random.normal((2, 10, 32))
    y = stack(x)
    first, state = stack(x[:, :6], return_state=True)
    second = stack(x[:, 6:], initial_state=state)
    ```
    """

    is_recomputed_in_parts = True

    def __init__(
        self,
        num_blocks,
        num_heads=4,
        slstm_at=(),
        block_style="original",
        norm_epsilon=1e-6,
        conv_kernel_size=4,
        mlstm_block=None,
        slstm_block=None,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        ffn_dim_factor=2.667,
        ffn_round_up_to=64,
        gate_soft_cap=15.0,
        denominator_epsilon=1e-6,
        chunk_size=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(num_blocks=num_blocks)
        if block_style not in BLOCK_STYLES:
            raise ValueError(
                f"`block_style` must be one of {BLOCK_STYLES}. Received: {block_style!r}."
            )
        slstm_at = check_slstm_at(slstm_at, num_blocks)
        for name, value in dict(mlstm_block=mlstm_block, slstm_block=slstm_block).items():
            if not isinstance(value or {}, dict) or (value and block_style != "original"):
                raise ValueError(
                    f"`{name}` must be a dict of arguments of original blocks, or None. "
                    f"Received: {name}={repr(value)}, block_style={block_style!r}."
                )
        self.num_blocks, self.num_heads, self.slstm_at = num_blocks, num_heads, slstm_at
        self.block_style, self.norm_epsilon = block_style, norm_epsilon
        self.conv_kernel_size = conv_kernel_size
        self.mlstm_block, self.slstm_block = dict(mlstm_block or {}), dict(slstm_block or {})
        self.qk_dim_factor, self.v_dim_factor = qk_dim_factor, v_dim_factor
        self.ffn_dim_factor, self.ffn_round_up_to = ffn_dim_factor, ffn_round_up_to
        self.gate_soft_cap, self.denominator_epsilon = gate_soft_cap, denominator_epsilon
        self.chunk_size, self.kernel = chunk_size, kernel
        self.supports_masking = True
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.blocks = [self._block(index) for index in range(num_blocks)]
        norm = dict(epsilon=norm_epsilon, dtype=self.dtype_policy, name="norm")
        self.norm = RMSNorm(**norm) if block_style == "large" else ZeroCenteredLayerNorm(**norm)

    def _block(self, index):
        slstm = index in self.slstm_at
        common = dict(
            num_heads=self.num_heads,
            norm_epsilon=self.norm_epsilon,
            num_blocks=self.num_blocks,
            block_index=index,
            dtype=self.dtype_policy,
            name=f"block_{index}",
        )
        mlstm = dict(chunk_size=self.chunk_size, kernel=self.kernel)
        if self.block_style == "large":
            return XLSTMLargeBlock(
                slstm=slstm,
                qk_dim_factor=self.qk_dim_factor,
                v_dim_factor=self.v_dim_factor,
                ffn_dim_factor=self.ffn_dim_factor,
                ffn_round_up_to=self.ffn_round_up_to,
                gate_soft_cap=self.gate_soft_cap,
                denominator_epsilon=self.denominator_epsilon,
                **mlstm,
                **common,
            )
        common["conv_kernel_size"] = self.conv_kernel_size
        if slstm:
            return SLSTMBlock(**common | self.slstm_block)
        return MLSTMBlock(**common | mlstm | self.mlstm_block)

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape)
        for layer in (*self.blocks, self.norm):
            layer.build(input_shape)

    def get_initial_state(self, batch_size):
        """The state before the first step, of all blocks."""
        return [block.get_initial_state(batch_size) for block in self.blocks]

    def call(self, x, initial_state=None, mask=None, reset=None, return_state=False, training=None):
        if mask is None:  # Keras fills the mask in only where no other tensor is passed
            mask = backend.get_keras_mask(x)
        mask, reset = as_flags(mask=mask, reset=reset)
        check_shapes(x=(x, "B S D"), mask=(mask, "B S"), reset=(reset, "B S"))
        if initial_state is None:
            initial_state = [None] * self.num_blocks
        self.check(x.shape[0], initial_state)
        states = []
        for block, state in zip(self.blocks, initial_state, strict=True):
            x, state = block(
                x,
                initial_state=state,
                mask=mask,
                reset=reset,
                return_state=True,
                training=training,
            )
            states.append(state)
        y = self.norm(x)
        return (y, states) if return_state else y

    def check(self, batch_size, initial_state, name="initial_state"):
        """Raises `ValueError` where a call would, see `Block.check`."""
        if not isinstance(initial_state, (list, tuple)) or len(initial_state) != self.num_blocks:
            is_list = isinstance(initial_state, (list, tuple))
            received = f"{len(initial_state)} of them" if is_list else repr(initial_state)
            raise ValueError(
                f"`{name}` must be a list of the states of all blocks, as return_state=True "
                f"returns it. Received: {received}, for {self.num_blocks} blocks."
            )
        for index, (block, state) in enumerate(zip(self.blocks, initial_state, strict=True)):
            block.check(batch_size, state, f"{name}[{index}]")

    def get_config(self):
        return super().get_config() | {
            "num_blocks": self.num_blocks,
            "num_heads": self.num_heads,
            "slstm_at": self.slstm_at,
            "block_style": self.block_style,
            "norm_epsilon": self.norm_epsilon,
            "conv_kernel_size": self.conv_kernel_size,
            "mlstm_block": self.mlstm_block,
            "slstm_block": self.slstm_block,
            "qk_dim_factor": self.qk_dim_factor,
            "v_dim_factor": self.v_dim_factor,
            "ffn_dim_factor": self.ffn_dim_factor,
            "ffn_round_up_to": self.ffn_round_up_to,
            "gate_soft_cap": self.gate_soft_cap,
            "denominator_epsilon": self.denominator_epsilon,
            "chunk_size": self.chunk_size,
            "kernel": self.kernel,
        }


def check_slstm_at(slstm_at, num_blocks):
    """The indices as a sorted list."""
    if isinstance(slstm_at, (list, tuple, range)):
        found = [i for i in range(num_blocks) if i in slstm_at]
        if len(found) == len(slstm_at) and all(map(is_int, slstm_at)):
            return found
    raise ValueError(
        "`slstm_at` must be a list of different indices of blocks, from 0 to num_blocks - 1. "
        f"Received: slstm_at={repr(slstm_at)}, num_blocks={num_blocks}."
    )
