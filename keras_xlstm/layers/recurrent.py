"""What `SLSTM` and `MLSTM` share: the contract of `keras.layers.LSTM` around a cell.

The cell does the mathematics, in two methods that give the same numbers: `call`, one step, for
`keras.layers.RNN`, and `sequence`, all steps, through a kernel.

A state is that of `keras_xlstm.ops`, float32 under every dtype policy, with all axes but the
batch flattened: `state_size` holds integers, as Keras' recurrent layers want it. Shaped states
are taken too.
"""

import keras
from keras import ops
from keras.src import backend

from keras_xlstm import kernels
from keras_xlstm.layers.composite import Composite, features_spec
from keras_xlstm.ops.checks import as_flags, as_tensor, check_shapes, check_state
from keras_xlstm.ops.masks import steps_that_happen, take_steps

STATE_DTYPE = "float32"


def flat_state(state, sizes):
    """Flattens all axes but the batch of each tensor, which must then have the width `size`."""
    return [ops.reshape(x, (-1, size)) for x, size in zip(state, sizes, strict=True)]


def flat_shapes(cell):
    """The name of each tensor of a cell's state, and its shape in each row."""
    return {name: (size,) for name, size in zip(cell.state_names, cell.state_size, strict=True)}


def checked_state(cell, state, batch_size, name="initial_state"):
    """What a caller hands in as the state of a cell, flat, in the dtypes that it came in."""
    check_state(state, flat_shapes(cell), batch_size, flat=True, name=name)
    state = [as_tensor(*pair) for pair in zip(cell.state_names, state, strict=True)]
    return flat_state(state, cell.state_size)


def like_state(state, like):
    """`state` in the shapes and dtypes of `like`: Keras' loops want back what they gave."""
    return [
        ops.cast(ops.reshape(x, (-1, *y.shape[1:])), y.dtype)
        for x, y in zip(state, like, strict=True)
    ]


class Recurrent(Composite, keras.layers.RNN):
    """A whole-sequence layer around a cell that has `sequence`. Not for use by itself."""

    def __init__(self, cell, **kwargs):
        super().__init__(cell, autocast=False, **kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)

    @property
    def changes_when_called(self):
        return self.stateful or self.cell.changes_when_called

    def build(self, sequences_shape):
        self.input_spec = features_spec(sequences_shape)
        super().build(sequences_shape)

    def call(self, sequences, initial_state=None, mask=None, reset=None, training=False):
        if mask is None:  # Keras fills the mask in only where no other tensor is passed
            mask = backend.get_keras_mask(sequences)
        kernels.check_name(self.cell.op, self.cell.kernel)
        x = ops.cast(sequences, self.compute_dtype)
        mask, reset = as_flags(mask=mask, reset=reset)
        check_shapes(sequences=(x, "B S D"), mask=(mask, "B S"), reset=(reset, "B S"))
        state = self._state_to_start_from(x, initial_state)
        if self.go_backwards:
            x, mask, reset = _backwards(x, mask, reset)
        h, state = self.cell.sequence(x, state, mask=mask, reset=reset, training=training)
        if self.stateful:
            for variable, value in zip(self.states, state, strict=True):
                variable.assign(value)
        if not self.return_sequences:
            h = _last_output(h, mask)
        elif mask is not None and not self.zero_output_for_mask:
            h = _hold_output(h, mask)
        return (h, *state) if self.return_state else h

    def _state_to_start_from(self, x, initial_state):
        if initial_state is None and not self.stateful:
            return self.get_initial_state(ops.shape(x)[0])
        if self.stateful and x.shape[0] not in (None, self._expected_batch_size):
            raise ValueError(
                "A stateful layer keeps one state per row, so the batch size must not change. "
                f"Received: batch size {x.shape[0]}, built for {self._expected_batch_size}. "
                "Build the layer for the new size, or pass stateful=False."
            )
        # Copies, since torch would differentiate through what is then assigned in place.
        state = [ops.copy(v) for v in self.states] if initial_state is None else initial_state
        state = checked_state(self.cell, state, x.shape[0])
        return [ops.cast(x, STATE_DTYPE) for x in state]

    def _create_state_variables(self, batch_size):
        states = [
            keras.Variable(x, trainable=False, dtype=STATE_DTYPE, name=f"state_{i}", autocast=False)
            for i, x in enumerate(self.get_initial_state(batch_size))
        ]
        # Part of `variables`, so that compiled training and prediction carry them on, but not of
        # `weights`: a stateful layer takes the weights of a stateless one.
        object.__setattr__(self, "states", states)

    @property
    def variables(self):
        return [*super().variables, *(self.states or [])]

    def reset_state(self):
        for variable in self.states or []:
            variable.assign(ops.zeros(variable.shape))

    def compute_output_spec(
        self, sequences, initial_state=None, mask=None, reset=None, training=False
    ):
        shapes = self.compute_output_shape(sequences.shape)
        if not self.return_state:
            return keras.KerasTensor(shapes, dtype=self.compute_dtype)
        dtypes = [self.compute_dtype] + [STATE_DTYPE] * len(self.state_size)
        return tuple(
            keras.KerasTensor(shape, dtype=dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )

    def get_config(self):
        config = super().get_config()
        cell = config.pop("cell")["config"]
        config["activity_regularizer"] = keras.regularizers.serialize(self.activity_regularizer)
        return {k: v for k, v in cell.items() if k not in ("name", "trainable", "dtype")} | config

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def _backwards(x, mask, reset):
    """Reverses time. A reset then stands where the document before it begins, which is its end."""
    x, mask = (None if y is None else ops.flip(y, axis=1) for y in (x, mask))
    if reset is None:
        return x, mask, None
    starts = ops.flip(reset, axis=1)
    happens = ops.ones_like(starts) if mask is None else mask
    starts = ops.cast(ops.logical_and(starts, happens), "int32")
    document = ops.cumsum(starts, axis=1) - starts  # counted from the end of the row
    order, rank = steps_that_happen(happens)
    before = ops.take_along_axis(order, ops.maximum(rank - 1, 0), axis=1)
    changes = ops.not_equal(document, ops.take_along_axis(document, before, axis=1))
    return x, mask, ops.logical_and(changes, happens)


def _last_output(h, mask):
    """The output of the last step that happened, (B, D); 0 where none did."""
    if 0 in h.shape[:2]:
        return ops.sum(h, axis=1)
    if mask is None:
        return h[:, -1]
    steps = ops.arange(ops.shape(h)[1], dtype="int32")
    last = ops.max(ops.where(mask, steps, 0), axis=1, keepdims=True)
    return ops.squeeze(take_steps(h, last), 1)


def _hold_output(h, mask):
    """Repeats each output until the next step that happens, as Keras' recurrent layers do."""
    order, rank = steps_that_happen(mask)
    held = take_steps(h, ops.take_along_axis(order, rank, axis=1))
    begun = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
    return ops.where(begun[..., None], held, ops.zeros_like(held))
