import keras
from keras import ops as kops
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from keras_xlstm import ops
from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.layers.dense import Dense
from keras_xlstm.layers.initializers import PowerlawForgetBias
from keras_xlstm.layers.recurrent import Recurrent, checked_state, flat_state, like_state
from keras_xlstm.ops.checks import check_divides, check_kernel, check_positive_int, check_rate


@keras.saving.register_keras_serializable("keras_xlstm")
class SLSTMRecurrence(keras.layers.Layer):
    """The recurrent part of the sLSTM: memory mixing in each head, and the biases of the gates.

    Maps gates (B, S, 4, NH, DH), in the order i, f, z, o, to h (B, S, NH, DH) and the state
    `[h, c, n, m]`, each (B, NH, DH), float32.

    Args:
        recurrent_initializer, recurrent_regularizer, recurrent_constraint: for the recurrent
            kernel, (NH, DH, 4, DH).
        bias_initializer, bias_regularizer, bias_constraint: for the bias, (4, NH, DH).
            `bias_initializer=None` for `PowerlawForgetBias()`.
        kernel: as for `keras_xlstm.ops.slstm`.

    Example:

    ```python
    h, state = SLSTMRecurrence()(keras.random.normal((2, 10, 4, 3, 8)))
    ```
    """

    def __init__(
        self,
        recurrent_initializer="zeros",
        bias_initializer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        recurrent_constraint=None,
        bias_constraint=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        self.recurrent_initializer = keras.initializers.get(recurrent_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer or PowerlawForgetBias())
        self.recurrent_regularizer = keras.regularizers.get(recurrent_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.recurrent_constraint = keras.constraints.get(recurrent_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        check_kernel(kernel)
        self.kernel = kernel
        self.input_spec = keras.layers.InputSpec(ndim=5, axes={2: 4})
        self.supports_masking = True

    def build(self, gates_shape):
        NH, DH = gates_shape[-2:]
        self.recurrent_kernel = self.add_weight(
            shape=(NH, DH, 4, DH),
            initializer=self.recurrent_initializer,
            regularizer=self.recurrent_regularizer,
            constraint=self.recurrent_constraint,
            autocast=False,
            name="recurrent_kernel",
        )
        self.bias = self.add_weight(
            shape=(4, NH, DH),
            initializer=self.bias_initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
            autocast=False,
            name="bias",
        )

    def call(self, gates, initial_state=None, mask=None, reset=None, recurrent_scale=None):
        h, state = ops.slstm(
            gates,
            self.recurrent_kernel,
            self.bias,
            initial_state=initial_state,
            mask=mask,
            reset=reset,
            recurrent_scale=recurrent_scale,
            return_state=True,
            kernel=self.kernel,
        )
        return h, list(state)

    def get_config(self):
        return super().get_config() | {
            "recurrent_initializer": keras.initializers.serialize(self.recurrent_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "recurrent_regularizer": keras.regularizers.serialize(self.recurrent_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "recurrent_constraint": keras.constraints.serialize(self.recurrent_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "kernel": self.kernel,
        }


@keras.saving.register_keras_serializable("keras_xlstm")
class SLSTMCell(Composite, DropoutRNNCell):
    """One step of the `SLSTM` layer, for `keras.layers.RNN` and for stacks of cells.

    Arguments, weights and numbers are those of `SLSTM`.

    Call arguments:
        inputs: float tensor, (B, D).
        states: h, c, n and m, each (B, units) or (B, NH, DH).
        training: bool, whether dropout applies.

    Returns:
        The output, (B, units), and the next states, in the dtypes and shapes of `states`.

    Example:

    ```python
    rnn = keras.layers.RNN(SLSTMCell(8, num_heads=2), return_sequences=True)
    rnn(keras.random.normal((2, 10, 16)))
    ```
    """

    op, state_names = "slstm", ("h", "c", "n", "m")

    def __init__(
        self,
        units,
        num_heads=4,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="zeros",
        bias_initializer=None,
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        kernel="auto",
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        check_positive_int(units=units, num_heads=num_heads)
        check_divides("num_heads", num_heads, "units", units)
        check_rate(dropout=dropout, recurrent_dropout=recurrent_dropout)
        self.units, self.num_heads, self.head_dim = units, num_heads, units // num_heads
        self.projection = Dense(
            4 * units,
            use_bias=False,
            kernel_initializer=kernel_initializer,
            kernel_regularizer=kernel_regularizer,
            kernel_constraint=kernel_constraint,
            dtype=self.dtype_policy,
            name="projection",
        )
        self.recurrence = SLSTMRecurrence(
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            kernel=kernel,
            dtype=self.dtype_policy,
            name="recurrence",
        )
        self.dropout, self.recurrent_dropout, self.seed = dropout, recurrent_dropout, seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.state_size = [units] * 4
        self.output_size = units
        self.input_spec = keras.layers.InputSpec(ndim=2)

    @property
    def changes_when_called(self):
        return max(self.dropout, self.recurrent_dropout) > 0

    @property
    def kernel(self):
        return self.recurrence.kernel

    def build(self, input_shape):
        self.input_spec = features_spec(input_shape, ndim=2)
        self.projection.build(input_shape)
        self.recurrence.build((None, None, 4, self.num_heads, self.head_dim))

    def get_initial_state(self, batch_size=None):
        return [kops.zeros((batch_size, size), dtype="float32") for size in self.state_size]

    def sequence(self, x, state, mask=None, reset=None, training=False):
        """All steps: x (B, S, D) in the compute dtype -> output (B, S, units), next state."""
        state, scale = self._shaped(state), None
        if training and self.dropout > 0:
            # One draw a sequence, for all its steps.
            x = x * self._create_dropout_mask(x[:, 0], self.dropout)[:, None]
        if training and self.recurrent_dropout > 0:
            scale = self._create_dropout_mask(state[0], self.recurrent_dropout)
        h, state = self.recurrence(
            self._gates(x), initial_state=state, mask=mask, reset=reset, recurrent_scale=scale
        )
        h = kops.reshape(h, (*kops.shape(h)[:2], self.units))
        return h, flat_state(state, self.state_size)

    def call(self, inputs, states, training=False):
        x = kops.cast(inputs, self.compute_dtype)
        state, scale = self._shaped(checked_state(self, states, x.shape[0], "states")), None
        if training and self.dropout > 0:
            x = x * self.get_dropout_mask(x)
        if training and self.recurrent_dropout > 0:
            scale = self._shaped([self.get_recurrent_dropout_mask(states[0])])[0]
        h, state = self.recurrence(
            self._gates(x[:, None]), initial_state=state, recurrent_scale=scale
        )
        return kops.reshape(h, (-1, self.units)), like_state(state, states)

    def _shaped(self, state):
        return [kops.reshape(x, (-1, self.num_heads, self.head_dim)) for x in state]

    def _gates(self, x):
        """(B, S, D) -> (B, S, 4, NH, DH)."""
        shape = (*kops.shape(x)[:2], 4, self.num_heads, self.head_dim)
        return kops.reshape(self.projection(x), shape)

    def get_config(self):
        config = super().get_config()
        projection, recurrence = self.projection.get_config(), self.recurrence.get_config()
        kernels = ("kernel_initializer", "kernel_regularizer", "kernel_constraint")
        return (
            config
            | {name: projection[name] for name in kernels}
            | {name: value for name, value in recurrence.items() if name not in config}
            | {
                "units": self.units,
                "num_heads": self.num_heads,
                "dropout": self.dropout,
                "recurrent_dropout": self.recurrent_dropout,
                "seed": self.seed,
            }
        )


@keras.saving.register_keras_serializable("keras_xlstm")
class SLSTM(Recurrent):
    """The sLSTM: scalar memories with exponential gates, in place of `keras.layers.LSTM`.

    `num_heads` blocks of units see each other's last outputs inside a block (memory mixing), so
    the layer can track a state, as a plain LSTM can and a parallel layer cannot.

    Args:
        units: int, the width of the output and of each state.
        num_heads: int, must divide `units`.
        kernel_initializer: initializer of the input projection, (D, 4 units).
        recurrent_initializer: initializer of the recurrent kernel, (NH, DH, 4, DH).
        bias_initializer: initializer of the bias, (4, NH, DH). `None` for
            `PowerlawForgetBias()`, whose forget gates span short and long memories.
        kernel_regularizer, recurrent_regularizer, bias_regularizer, kernel_constraint,
            recurrent_constraint, bias_constraint: as in `keras.layers.LSTM`.
        dropout: float in [0, 1), the share of the input's features dropped for a whole sequence.
        recurrent_dropout: float in [0, 1), the same for the outputs that are fed back.
        seed: int, for dropout.
        return_sequences: bool, whether to return the outputs of all steps, (B, S, units), or
            the last, (B, units).
        return_state: bool, whether to return `(output, h, c, n, m)`: the state of
            `keras_xlstm.ops.slstm`, float32, each tensor flattened to (B, units).
        go_backwards: bool, whether to read from the last step to the first, and return in that
            order.
        stateful: bool, whether each row goes on from its state after the call before.
        zero_output_for_mask: bool. At masked steps the output is 0 if `True`, else that of the
            last step that happened, as in `keras.layers.LSTM`.
        kernel: as for `keras_xlstm.ops.slstm`.

    Call arguments:
        sequences: float tensor, (B, S, D).
        initial_state: list of h, c, n and m, each (B, units), as `return_state` gives them, or
            (B, NH, DH). `None` for zeros.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step: a
            new document begins in the row.
        training: bool, whether dropout applies.

    Source: Beck et al. 2024, arXiv:2405.04517, Sec. 2.2.

    Example:

    ```python
    x = keras.random.normal((2, 10, 16))
    y = SLSTM(32, num_heads=4)(x)  # (2, 32)
    y, *state = SLSTM(32, num_heads=4, return_sequences=True, return_state=True)(x)
    ```
    """

    def __init__(
        self,
        units,
        num_heads=4,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="zeros",
        bias_initializer=None,
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        dropout=0.0,
        recurrent_dropout=0.0,
        seed=None,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        kernel="auto",
        **kwargs,
    ):
        cell = SLSTMCell(
            units,
            num_heads=num_heads,
            kernel_initializer=kernel_initializer,
            recurrent_initializer=recurrent_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            recurrent_regularizer=recurrent_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            recurrent_constraint=recurrent_constraint,
            bias_constraint=bias_constraint,
            dropout=dropout,
            recurrent_dropout=recurrent_dropout,
            seed=seed,
            kernel=kernel,
            dtype=kwargs.get("dtype"),
            trainable=kwargs.get("trainable", True),
            name="slstm_cell",
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
