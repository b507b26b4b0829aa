import keras
from keras import ops as kops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_xlstm import ops
from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.layers.dense import Dense, GateProjection
from keras_xlstm.layers.initializers import Linspace
from keras_xlstm.layers.multi_head_norm import MultiHeadNorm
from keras_xlstm.layers.recurrent import Recurrent, checked_state, flat_state, like_state
from keras_xlstm.ops.checks import (
    check_cap,
    check_divides,
    check_kernel,
    check_number,
    check_positive,
    check_positive_int,
    check_rate,
    given,
    is_number,
)
from keras_xlstm.ops.linear import rows


@keras.saving.register_keras_serializable("keras_xlstm")
class MLSTMCell(Composite, DropoutRNNCell):
    """One step of the `MLSTM` layer, for `keras.layers.RNN` and for stacks of cells.

    Arguments, weights and numbers are those of `MLSTM`.

    Call arguments:
        inputs: float tensor, (B, D).
        states: C, n and m, flat as in `state_size` or shaped as in `keras_xlstm.ops.mlstm`.
        training: bool, whether dropout applies.

    Returns:
        The output, (B, units), and the next states, in the dtypes and shapes of `states`.

    Example:

    ```python
    rnn = keras.layers.RNN(MLSTMCell(8, num_heads=2), return_sequences=True)
    rnn(keras.random.normal((2, 10, 16)))
    ```
    """

    op, state_names = "mlstm", ("C", "n", "m")

    def __init__(
        self,
        units,
        num_heads=4,
        key_dim=None,
        value_dim=None,
        gate_soft_cap=15.0,
        input_gate_bias=-10.0,
        forget_gate_bias=(3.0, 6.0),
        norm_epsilon=1e-6,
        denominator_epsilon=1e-6,
        kernel_initializer=None,
        output_initializer="glorot_uniform",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        seed=None,
        chunk_size=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(
            units=units,
            num_heads=num_heads,
            **given(key_dim=key_dim, value_dim=value_dim, chunk_size=chunk_size),
        )
        check_cap(gate_soft_cap=gate_soft_cap)
        check_number(input_gate_bias=input_gate_bias)
        check_positive(norm_epsilon=norm_epsilon, denominator_epsilon=denominator_epsilon)
        check_rate(dropout=dropout)
        check_kernel(kernel)
        if value_dim is None:
            check_divides("num_heads", num_heads, "units", units)
            value_dim = units // num_heads
        if key_dim is None:
            key_dim = max(value_dim // 2, 1)
        self.units, self.num_heads = units, num_heads
        self.key_dim, self.value_dim = key_dim, value_dim
        self.gate_soft_cap, self.norm_epsilon = gate_soft_cap, norm_epsilon
        self.denominator_epsilon = denominator_epsilon
        self.input_gate_bias, self.forget_gate_bias = input_gate_bias, _pair(forget_gate_bias)
        # Small-init is this one: the variance 2 / (5 fan_in).
        self.kernel_initializer = keras.initializers.get(
            kernel_initializer
            or keras.initializers.VarianceScaling(0.4, "fan_in", "untruncated_normal")
        )
        self.output_initializer = keras.initializers.get(output_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.dropout, self.recurrent_dropout, self.seed = dropout, 0.0, seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.chunk_size, self.kernel = chunk_size, kernel
        self.state_size = [num_heads * key_dim * value_dim, num_heads * key_dim, num_heads]
        self.output_size = units
        self.input_spec = keras.layers.InputSpec(ndim=2)

    @property
    def changes_when_called(self):
        return self.dropout > 0

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape, ndim=2)
        NH = self.num_heads

        def project(width, name, kernel_initializer, cls=Dense, **kwargs):
            layer = cls(
                width,
                name=name,
                # Unseeded, one initializer would give every projection the same numbers.
                kernel_initializer=keras.initializers.get(kernel_initializer).clone(),
                kernel_regularizer=self.kernel_regularizer,
                kernel_constraint=self.kernel_constraint,
                **kwargs,
            )
            layer.build(input_shape)
            return layer

        matrix = dict(
            use_bias=False,
            kernel_initializer=self.kernel_initializer,
            dtype=self.dtype_policy,
        )
        self.query = project(NH * self.key_dim, "query", **matrix)
        self.key = project(NH * self.key_dim, "key", **matrix)
        self.value = project(NH * self.value_dim, "value", **matrix)
        self.output_gate = project(NH * self.value_dim, "output_gate", **matrix)
        gate = dict(
            cls=GateProjection,
            kernel_initializer="zeros",
            bias_regularizer=self.bias_regularizer,
            bias_constraint=self.bias_constraint,
            dtype="float32",
        )
        input_bias = keras.initializers.Constant(self.input_gate_bias)
        self.input_gate = project(NH, "input_gate", bias_initializer=input_bias, **gate)
        forget_bias = Linspace(*self.forget_gate_bias)
        self.forget_gate = project(NH, "forget_gate", bias_initializer=forget_bias, **gate)
        self.norm = MultiHeadNorm(self.norm_epsilon, dtype=self.dtype_policy, name="norm")
        self.norm.build((None, None, NH, self.value_dim))
        self.output_projection = Dense(
            self.units,
            use_bias=False,
            kernel_initializer=self.output_initializer,
            kernel_regularizer=self.kernel_regularizer,
            kernel_constraint=self.kernel_constraint,
            dtype=self.dtype_policy,
            name="output",
        )
        self.output_projection.build((None, NH * self.value_dim))

    def get_initial_state(self, batch_size=None):
        return [kops.zeros((batch_size, size), dtype="float32") for size in self.state_size]

    def sequence(self, x, state, mask=None, reset=None, training=False):
        """All steps: x (B, S, D) in the compute dtype -> output (B, S, units), next state."""
        if training and self.dropout > 0:
            # One draw a sequence, for all its steps.
            x = x * self._create_dropout_mask(x[:, 0], self.dropout)[:, None]
        h, state = ops.mlstm(
            *self._project(x),
            initial_state=self._shaped(state),
            mask=mask,
            reset=reset,
            return_state=True,
            chunk_size=self.chunk_size,
            eps=self.denominator_epsilon,
            kernel=self.kernel,
        )
        return self._read_out(h, x), flat_state(state, self.state_size)

    def call(self, inputs, states, training=False):
        x = kops.cast(inputs, self.compute_dtype)
        state = self._shaped(checked_state(self, states, x.shape[0], "states"))
        if training and self.dropout > 0:
            x = x * self.get_dropout_mask(x)
        h, state = ops.mlstm_step(*self._project(x), state, eps=self.denominator_epsilon)
        return self._read_out(h, x), like_state(state, states)

    def _shaped(self, state):
        NH, DHQK, DHHV = self.num_heads, self.key_dim, self.value_dim
        shapes = (-1, NH, DHQK, DHHV), (-1, NH, DHQK), (-1, NH)
        return [kops.reshape(x, shape) for x, shape in zip(state, shapes, strict=True)]

    def _project(self, x):
        """(..., D) -> q, k, v (..., NH, DH) and the gates i, f (..., NH), capped, float32."""
        lead, NH, x = kops.shape(x)[:-1], self.num_heads, rows(x)
        q = kops.reshape(self.query(x), (*lead, NH, self.key_dim))
        k = kops.reshape(self.key(x), (*lead, NH, self.key_dim))
        v = kops.reshape(self.value(x), (*lead, NH, self.value_dim))
        i, f = (
            ops.soft_cap(kops.reshape(gate(x), (*lead, NH)), self.gate_soft_cap)
            for gate in (self.input_gate, self.forget_gate)
        )
        return q, k, v, i, f

    def _read_out(self, h, x):
        lead, x = kops.shape(x)[:-1], rows(x)
        h = kops.reshape(self.norm(h), (*kops.shape(x)[:-1], self.num_heads * self.value_dim))
        y = self.output_projection(kops.sigmoid(self.output_gate(x)) * h)
        return kops.reshape(y, (*lead, self.units))

    def get_config(self):
        return super().get_config() | {
            "units": self.units,
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "gate_soft_cap": self.gate_soft_cap,
            "input_gate_bias": self.input_gate_bias,
            "forget_gate_bias": self.forget_gate_bias,
            "norm_epsilon": self.norm_epsilon,
            "denominator_epsilon": self.denominator_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "dropout": self.dropout,
            "seed": self.seed,
            "chunk_size": self.chunk_size,
            "kernel": self.kernel,
        }


@keras.saving.register_keras_serializable("keras_xlstm")
class MLSTM(Recurrent):
    """The mLSTM layer of xLSTM-7B: a matrix memory a head, in place of `keras.layers.LSTM`.

    Queries, keys, values, the output gate and the exponential gates are read from the input; the
    heads' outputs are normalized, gated and projected. There is no path from an output to the
    next step's gates, so whole sequences are computed in parallel.

    Args:
        units: int, the width of the output.
        num_heads: int, the number of memories.
        key_dim: int, DHQK, the width of queries and keys in each head. `None` for half of
            `value_dim`.
        value_dim: int, DHHV, the width of values in each head. `None` for `units / num_heads`.
        gate_soft_cap: float, bounds the input and forget gates' pre-activations; `None` for none.
        input_gate_bias: float, where the input gates' bias starts.
        forget_gate_bias: two floats, the range over the heads in which the forget gates' bias
            starts.
        norm_epsilon: float, of the normalization of each head.
        denominator_epsilon: float, `eps` of `keras_xlstm.ops.mlstm`.
        kernel_initializer: initializer of the projections of the input. `None` for small-init,
            the variance 2 / (5 D).
        output_initializer: initializer of the output projection.
        kernel_regularizer, bias_regularizer, kernel_constraint, bias_constraint: for the
            projections' kernels, and for the gates' biases.
        dropout: float in [0, 1), the share of the input's features dropped for a whole sequence.
        seed: int, for dropout.
        return_sequences: bool, whether to return the outputs of all steps, (B, S, units), or
            the last, (B, units).
        return_state: bool, whether to return `(output, C, n, m)`: the state of
            `keras_xlstm.ops.mlstm`, float32, each tensor flattened to (B, width).
        go_backwards: bool, whether to read from the last step to the first, and return in that
            order.
        stateful: bool, whether each row goes on from its state after the call before.
        zero_output_for_mask: bool. At masked steps the output is 0 if `True`, else that of the
            last step that happened, as in `keras.layers.LSTM`.
        chunk_size, kernel: as for `keras_xlstm.ops.mlstm`.

    Call arguments:
        sequences: float tensor, (B, S, D).
        initial_state: list of C, n and m, as `return_state` gives them, or shaped as in
            `keras_xlstm.ops.mlstm`. `None` for zeros.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step: a
            new document begins in the row.
        training: bool, whether dropout applies.

    Source: Beck et al. 2025, arXiv:2503.13427, Sec. 2; Beck et al. 2024, arXiv:2405.04517.

    Example:

    ```python
    x = keras.random.normal((2, 10, 16))
    y = MLSTM(32, num_heads=4)(x)  # (2, 32)
    y, *state = MLSTM(32, num_heads=4, return_sequences=True, return_state=True)(x)
    ```
    """

    def __init__(
        self,
        units,
        num_heads=4,
        key_dim=None,
        value_dim=None,
        gate_soft_cap=15.0,
        input_gate_bias=-10.0,
        forget_gate_bias=(3.0, 6.0),
        norm_epsilon=1e-6,
        denominator_epsilon=1e-6,
        kernel_initializer=None,
        output_initializer="glorot_uniform",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        chunk_size=None,
        kernel="auto",
        **kwargs,
    ):
        cell = MLSTMCell(
            units,
            num_heads=num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            gate_soft_cap=gate_soft_cap,
            input_gate_bias=input_gate_bias,
            forget_gate_bias=forget_gate_bias,
            norm_epsilon=norm_epsilon,
            denominator_epsilon=denominator_epsilon,
            kernel_initializer=kernel_initializer,
            output_initializer=output_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            seed=seed,
            chunk_size=chunk_size,
            kernel=kernel,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="mlstm_cell",
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            **kwargs,
        )

    @property
    def units(self):
        return self.cell.units

    @property
    def num_heads(self):
        return self.cell.num_heads


def _pair(forget_gate_bias):
    pair = tuple(forget_gate_bias) if isinstance(forget_gate_bias, (list, tuple)) else ()
    if len(pair) != 2 or not all(map(is_number, pair)):
        raise ValueError(
            "`forget_gate_bias` must be two finite numbers, for the first head and the last. "
            f"Received: forget_gate_bias={forget_gate_bias!r}."
        )
    return pair
