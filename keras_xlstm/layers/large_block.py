import keras

from keras_xlstm.layers.block import Block, round_up
from keras_xlstm.layers.feed_forward import GatedFeedForward
from keras_xlstm.layers.initializers import PowerlawForgetBias, small_init, wang_init
from keras_xlstm.layers.mlstm import MLSTM
from keras_xlstm.layers.multi_head_norm import MultiHeadNorm
from keras_xlstm.layers.recurrent import flat_shapes
from keras_xlstm.layers.rms_norm import RMSNorm
from keras_xlstm.layers.slstm import SLSTM
from keras_xlstm.ops.checks import (
    check_cap,
    check_divides,
    check_positive,
    check_positive_int,
    given,
)


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMLargeBlock(Block):
    """The block of xLSTM-7B: RMSNorm, mLSTM, residual; RMSNorm, SwiGLU, residual.

    With `slstm=True` an sLSTM, normalized head by head, stands in place of the mLSTM.

    Args:
        num_heads: int.
        qk_dim_factor: float, the width of all queries over the block's width.
        v_dim_factor: float, the width of all values over the block's width.
        ffn_dim_factor: float, the width inside the SwiGLU over the block's width,
        ffn_round_up_to: int, rounded down to a whole number and then up to a multiple of this,
            as in the 7B model: 2.667 x 768 = 2048.3 gives 2048.
        gate_soft_cap: float or `None`, bounds the mLSTM's gates.
        norm_epsilon: float, of all normalizations.
        denominator_epsilon: float, `eps` of `keras_xlstm.ops.mlstm`.
        slstm: bool, whether the block holds an sLSTM.
        num_blocks: int, blocks in the model, and
        block_index: int, this block's place among them: both for the initialization.
        chunk_size, kernel: as for `keras_xlstm.ops.mlstm`.

    Call arguments: those of every block; the state is `[C, n, m]`, or `[h, c, n, m]` of an sLSTM.

    Source: Beck et al. 2025, arXiv:2503.13427, Sec. 2.

    Example:

    ```python
    XLSTMLargeBlock(num_heads=2)(keras.random.normal((2, 10, 32)))
    ```
    """

    op, takes_flat_state = "mlstm", True

    def __init__(
        self,
        num_heads=4,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        ffn_dim_factor=2.667,
        ffn_round_up_to=64,
        gate_soft_cap=15.0,
        norm_epsilon=1e-6,
        denominator_epsilon=1e-6,
        slstm=False,
        num_blocks=1,
        block_index=0,
        chunk_size=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(num_blocks, block_index, norm_epsilon, kernel, **kwargs)
        check_positive_int(
            num_heads=num_heads, ffn_round_up_to=ffn_round_up_to, **given(chunk_size=chunk_size)
        )
        check_positive(
            qk_dim_factor=qk_dim_factor,
            v_dim_factor=v_dim_factor,
            ffn_dim_factor=ffn_dim_factor,
            denominator_epsilon=denominator_epsilon,
        )
        check_cap(gate_soft_cap=gate_soft_cap)
        self.num_heads = num_heads
        self.qk_dim_factor, self.v_dim_factor = qk_dim_factor, v_dim_factor
        self.ffn_dim_factor, self.ffn_round_up_to = ffn_dim_factor, ffn_round_up_to
        self.gate_soft_cap, self.slstm = gate_soft_cap, slstm
        self.denominator_epsilon = denominator_epsilon
        self.chunk_size = chunk_size

    def build(self, input_shape):
        super().build(input_shape)
        D = input_shape[-1]
        self.norm = self._rms_norm("norm", input_shape)
        self.mixer = self._slstm(D) if self.slstm else self._mlstm(D)
        self.mixer.build(input_shape)
        if self.slstm:
            self.head_norm = MultiHeadNorm(
                self.norm_epsilon, dtype=self.dtype_policy, name="head_norm"
            )
            self.head_norm.build((None, None, self.num_heads, D // self.num_heads))
        self.ffn_norm = self._rms_norm("ffn_norm", input_shape)
        self.ffn = GatedFeedForward(
            round_up(self._width("ffn_dim_factor", D), self.ffn_round_up_to),
            num_blocks=self.num_blocks,
            dtype=self.dtype_policy,
            name="ffn",
        )
        self.ffn.build(input_shape)

    def _rms_norm(self, name, input_shape):
        norm = RMSNorm(epsilon=self.norm_epsilon, dtype=self.dtype_policy, name=name)
        norm.build(input_shape)
        return norm

    def _mlstm(self, D):
        NH = self.num_heads
        qk_width, v_width = self._width("qk_dim_factor", D), self._width("v_dim_factor", D)
        check_divides("num_heads", NH, "width of all queries", qk_width)
        check_divides("num_heads", NH, "width of all values", v_width)
        return MLSTM(
            D,
            num_heads=NH,
            key_dim=qk_width // NH,
            value_dim=v_width // NH,
            gate_soft_cap=self.gate_soft_cap,
            norm_epsilon=self.norm_epsilon,
            denominator_epsilon=self.denominator_epsilon,
            kernel_initializer=small_init(D),
            output_initializer=wang_init(D, self.num_blocks),
            chunk_size=self.chunk_size,
            kernel=self.kernel,
            **self._whole_sequences("mlstm"),
        )

    def _width(self, factor, D):
        width = int(getattr(self, factor) * D)  # a fraction is cut off, as in the 7B model
        if width < 1:
            raise ValueError(
                f"`{factor}` times the input's width must be at least 1. "
                f"Received: {factor}={getattr(self, factor)}, and the width {D}."
            )
        return width

    def _slstm(self, D):
        check_divides("num_heads", self.num_heads, "input width", D)
        return SLSTM(
            D,
            num_heads=self.num_heads,
            kernel_initializer=small_init(D),
            bias_initializer=PowerlawForgetBias(
                0.3 + 1.3 * self.block_index / max(self.num_blocks - 1, 1)
            ),
            **self._whole_sequences("slstm"),
        )

    def _whole_sequences(self, name):
        return dict(
            return_sequences=True,
            return_state=True,
            zero_output_for_mask=True,
            dtype=self.dtype_policy,
            name=name,
        )

    @property
    def state_shapes(self):
        return flat_shapes(self.mixer.cell)

    def mix(self, x, state, mask, reset):
        y, *state = self.mixer(self.norm(x), initial_state=state, mask=mask, reset=reset)
        if self.slstm:
            y = self._normalize_heads(y)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state

    def _normalize_heads(self, y):
        (B, S), D = keras.ops.shape(y)[:2], y.shape[-1]
        y = keras.ops.reshape(y, (B, S, self.num_heads, D // self.num_heads))
        return keras.ops.reshape(self.head_norm(y), (B, S, D))

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "qk_dim_factor": self.qk_dim_factor,
            "v_dim_factor": self.v_dim_factor,
            "ffn_dim_factor": self.ffn_dim_factor,
            "ffn_round_up_to": self.ffn_round_up_to,
            "gate_soft_cap": self.gate_soft_cap,
            "denominator_epsilon": self.denominator_epsilon,
            "slstm": self.slstm,
            "chunk_size": self.chunk_size,
        }
