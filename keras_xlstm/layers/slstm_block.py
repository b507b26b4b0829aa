import keras
from keras import ops as kops

from keras_xlstm.layers.block import Block, check_conv_kernel_size, round_up
from keras_xlstm.layers.causal_conv1d import CausalConv1D
from keras_xlstm.layers.feed_forward import GatedFeedForward
from keras_xlstm.layers.headwise_dense import HeadwiseDense
from keras_xlstm.layers.initializers import PowerlawForgetBias
from keras_xlstm.layers.multi_head_norm import MultiHeadNorm
from keras_xlstm.layers.slstm import SLSTMRecurrence
from keras_xlstm.layers.zero_centered_layer_norm import ZeroCenteredLayerNorm
from keras_xlstm.ops.checks import check_divides, check_positive, check_positive_int


@keras.saving.register_keras_serializable("keras_xlstm")
class SLSTMBlock(Block):
    """The sLSTM block of the 2024 paper: convolution, sLSTM, gated feed-forward network.

        y = norm(x); c = silu(conv(y))
        x = x + head_norm(slstm(i(c), f(c), z(y), o(y)))     headwise projections
        x = x + ffn(ffn_norm(x))

    Args:
        num_heads: int, must divide the block's width.
        conv_kernel_size: int, steps that the convolution sees. 0 leaves it out: c = y.
        ffn_dim_factor: float, the width inside the network over the block's width,
        ffn_round_up_to: int, rounded up to a multiple of this.
        norm_epsilon: float, of all normalizations.
        num_blocks: int, blocks in the model, and
        block_index: int, this block's place among them: both for the initialization.
        kernel: as for `keras_xlstm.ops.slstm`.

    Call arguments: those of every block; the state is `[conv, h, c, n, m]`, without `conv` where
    there is no convolution.

    Source: Beck et al. 2024, arXiv:2405.04517, Fig. 10.

    Example:

    ```python
    SLSTMBlock(num_heads=2)(keras.random.normal((2, 10, 32)))
    ```
    """

    op = "slstm"

    def __init__(
        self,
        num_heads=4,
        conv_kernel_size=4,
        ffn_dim_factor=1.3,
        ffn_round_up_to=64,
        norm_epsilon=1e-6,
        num_blocks=1,
        block_index=0,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(num_blocks, block_index, norm_epsilon, kernel, **kwargs)
        check_positive_int(num_heads=num_heads, ffn_round_up_to=ffn_round_up_to)
        check_positive(ffn_dim_factor=ffn_dim_factor)
        check_conv_kernel_size(conv_kernel_size)
        self.num_heads, self.conv_kernel_size = num_heads, conv_kernel_size
        self.ffn_dim_factor, self.ffn_round_up_to = ffn_dim_factor, ffn_round_up_to

    def build(self, input_shape):
        super().build(input_shape)
        D, NH = input_shape[-1], self.num_heads
        check_divides("num_heads", NH, "input width", D)
        self.head_dim = D // NH
        self.norm, self.ffn_norm = (
            ZeroCenteredLayerNorm(self.norm_epsilon, dtype=self.dtype_policy, name=name)
            for name in ("norm", "ffn_norm")
        )
        if self.conv_kernel_size:
            self.conv = CausalConv1D(self.conv_kernel_size, dtype=self.dtype_policy, name="conv")
            self.conv.build(input_shape)
        self.input_gate, self.forget_gate, self.cell_input, self.output_gate = (
            HeadwiseDense(NH, dtype=self.dtype_policy, name=name)
            for name in ("input_gate", "forget_gate", "cell_input", "output_gate")
        )
        for layer in (self.input_gate, self.forget_gate, self.cell_input, self.output_gate):
            layer.build(input_shape)
        exponent = 0.3 + 1.3 * self.block_index / max(self.num_blocks - 1, 1)
        self.recurrence = SLSTMRecurrence(
            bias_initializer=PowerlawForgetBias(exponent),
            kernel=self.kernel,
            dtype=self.dtype_policy,
            name="recurrence",
        )
        self.recurrence.build((None, None, 4, NH, self.head_dim))
        self.head_norm = MultiHeadNorm(
            self.norm_epsilon, zero_centered=True, dtype=self.dtype_policy, name="head_norm"
        )
        self.head_norm.build((None, None, NH, self.head_dim))
        self.ffn = GatedFeedForward(
            round_up(self.ffn_dim_factor * D, self.ffn_round_up_to),
            activation="gelu",
            num_blocks=self.num_blocks,
            dtype=self.dtype_policy,
            name="ffn",
        )
        for layer in (self.norm, self.ffn_norm, self.ffn):
            layer.build(input_shape)

    @property
    def state_shapes(self):
        NH, DH, K = self.num_heads, self.head_dim, self.conv_kernel_size
        conv = {"conv": (K - 1, NH * DH)} if K else {}
        return conv | dict.fromkeys("hcnm", (NH, DH))

    def mix(self, x, state, mask, reset):
        conv_state, state = state[:-4], state[-4:]
        y = c = self.norm(x)
        if self.conv_kernel_size:
            c, new = self.conv(
                y, initial_state=conv_state[0], mask=mask, reset=reset, return_state=True
            )
            c, conv_state = kops.silu(c), [new]
        gates = [self.input_gate(c), self.forget_gate(c), self.cell_input(y), self.output_gate(y)]
        heads = (*kops.shape(x)[:2], self.num_heads, self.head_dim)
        gates = kops.stack([kops.reshape(g, heads) for g in gates], axis=2)
        h, state = self.recurrence(gates, initial_state=state, mask=mask, reset=reset)
        x = x + kops.reshape(self.head_norm(h), kops.shape(x))
        return x + self.ffn(self.ffn_norm(x)), [*conv_state, *state]

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "conv_kernel_size": self.conv_kernel_size,
            "ffn_dim_factor": self.ffn_dim_factor,
            "ffn_round_up_to": self.ffn_round_up_to,
        }
