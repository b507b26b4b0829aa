import keras
from keras import ops as kops

from keras_xlstm import ops
from keras_xlstm.layers.block import Block, check_conv_kernel_size, round_up
from keras_xlstm.layers.causal_conv1d import CausalConv1D
from keras_xlstm.layers.dense import GateProjection
from keras_xlstm.layers.headwise_dense import HeadwiseDense
from keras_xlstm.layers.initializers import Linspace, small_init, wang_init
from keras_xlstm.layers.multi_head_norm import MultiHeadNorm
from keras_xlstm.layers.zero_centered_layer_norm import ZeroCenteredLayerNorm
from keras_xlstm.ops.checks import check_divides, check_positive, check_positive_int, given


@keras.saving.register_keras_serializable("keras_xlstm")
class MLSTMBlock(Block):
    """The mLSTM block of the 2024 paper: up-projection, convolution, mLSTM, down-projection.

        u, z = up(norm(x)); c = silu(conv(u))
        q, k = headwise(c); v = headwise(u); i, f = dense(concat(q, k, v))
        y    = x + down((head_norm(mlstm(q, k, v, i, f)) + skip c) silu(z))

    Args:
        num_heads: int.
        conv_kernel_size: int, steps that the convolution sees. 0 leaves it out: c = u.
        qkv_block_size: int, features that each block of the headwise projections mixes.
        proj_factor: float, the inner width over the block's width,
        proj_round_up_to: int, rounded up to a multiple of this.
        norm_epsilon: float, of both normalizations.
        num_blocks: int, blocks in the model, and
        block_index: int, this block's place among them: both for the initialization.
        chunk_size, kernel: as for `keras_xlstm.ops.mlstm`.

    Call arguments: those of every block; the state is `[conv, C, n, m]`, without `conv` where
    there is no convolution.

    Source: Beck et al. 2024, arXiv:2405.04517, Fig. 11.

    Example:

    ```python
    MLSTMBlock(num_heads=2)(keras.random.normal((2, 10, 32)))
    ```
    """

    op = "mlstm"

    def __init__(
        self,
        num_heads=4,
        conv_kernel_size=4,
        qkv_block_size=4,
        proj_factor=2.0,
        proj_round_up_to=64,
        norm_epsilon=1e-6,
        num_blocks=1,
        block_index=0,
        chunk_size=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(num_blocks, block_index, norm_epsilon, kernel, **kwargs)
        check_positive_int(
            num_heads=num_heads,
            qkv_block_size=qkv_block_size,
            proj_round_up_to=proj_round_up_to,
            **given(chunk_size=chunk_size),
        )
        check_positive(proj_factor=proj_factor)
        check_conv_kernel_size(conv_kernel_size)
        self.num_heads, self.conv_kernel_size = num_heads, conv_kernel_size
        self.qkv_block_size, self.proj_factor = qkv_block_size, proj_factor
        self.proj_round_up_to = proj_round_up_to
        self.chunk_size = chunk_size

    def build(self, input_shape):
        super().build(input_shape)
        D, NH = input_shape[-1], self.num_heads
        inner = round_up(self.proj_factor * D, self.proj_round_up_to)
        check_divides("num_heads", NH, "inner width", inner)
        check_divides("qkv_block_size", self.qkv_block_size, "inner width", inner, "blocks")
        self.head_dim = inner // NH
        self.norm = ZeroCenteredLayerNorm(self.norm_epsilon, dtype=self.dtype_policy, name="norm")
        self.norm.build(input_shape)
        self.up = self._dense(2 * inner, "up", small_init(D), D)
        if self.conv_kernel_size:
            self.conv = CausalConv1D(self.conv_kernel_size, dtype=self.dtype_policy, name="conv")
            self.conv.build((None, None, inner))
        blocks = inner // self.qkv_block_size
        self.query, self.key, self.value = (
            HeadwiseDense(
                blocks, kernel_initializer=small_init(D), dtype=self.dtype_policy, name=name
            )
            for name in ("query", "key", "value")
        )
        for layer in (self.query, self.key, self.value):
            layer.build((None, None, inner))
        biases = keras.initializers.RandomNormal(stddev=0.1), Linspace(3.0, 6.0)
        self.input_gate, self.forget_gate = (
            GateProjection(
                NH, kernel_initializer="zeros", bias_initializer=bias, dtype="float32", name=name
            )
            for name, bias in zip(("input_gate", "forget_gate"), biases, strict=True)
        )
        for layer in (self.input_gate, self.forget_gate):
            layer.build((None, None, 3 * inner))
        self.head_norm = MultiHeadNorm(
            self.norm_epsilon, zero_centered=True, dtype=self.dtype_policy, name="head_norm"
        )
        self.head_norm.build((None, None, NH, self.head_dim))
        self.skip = self.add_weight(shape=(inner,), initializer="ones", name="skip")
        self.down = self._dense(D, "down", wang_init(D, self.num_blocks), inner)

    @property
    def state_shapes(self):
        NH, DH, K = self.num_heads, self.head_dim, self.conv_kernel_size
        conv = {"conv": (K - 1, NH * DH)} if K else {}
        return conv | {"C": (NH, DH, DH), "n": (NH, DH), "m": (NH,)}

    def mix(self, x, state, mask, reset):
        *conv_state, C, n, m = state
        u, z = kops.split(self.up(self.norm(x)), 2, axis=-1)
        c = u
        if self.conv_kernel_size:
            c, state = self.conv(
                u, initial_state=conv_state[0], mask=mask, reset=reset, return_state=True
            )
            c, conv_state = kops.silu(c), [state]
        q, k, v = self.query(c), self.key(c), self.value(u)
        qkv = kops.concatenate([q, k, v], axis=-1)
        heads = (*kops.shape(x)[:2], self.num_heads, self.head_dim)
        h, state = ops.mlstm(
            *(kops.reshape(y, heads) for y in (q, k, v)),
            self.input_gate(qkv),
            self.forget_gate(qkv),
            initial_state=(C, n, m),
            mask=mask,
            reset=reset,
            return_state=True,
            chunk_size=self.chunk_size,
            kernel=self.kernel,
        )
        h = kops.reshape(self.head_norm(h), kops.shape(c))
        h = (h + kops.cast(self.skip, h.dtype) * c) * kops.silu(z)
        return x + self.down(h), [*conv_state, *state]

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "conv_kernel_size": self.conv_kernel_size,
            "qkv_block_size": self.qkv_block_size,
            "proj_factor": self.proj_factor,
            "proj_round_up_to": self.proj_round_up_to,
            "chunk_size": self.chunk_size,
        }
