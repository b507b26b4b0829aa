"""Around `fit`: documents packed into rows, and series longer than a gradient reaches."""

import os

import keras
import numpy as np
from keras import ops

from keras_xlstm.files import saving_file
from keras_xlstm.ops.checks import check_ids, check_positive_int, repr

if keras.backend.backend() == "torch":
    import torch


def pack(documents, sequence_length, pad_token_id=0):
    """Puts documents of different lengths into rows, for a language model with `packed=True`.

    Each row holds as many documents as fit. None sees another: the state is cleared between them,
    and no token is to be predicted from the document before its own.

    Args:
        documents: list of lists of token ids. One of less than two tokens has nothing to predict
            and is left out. One that is longer than a row continues, without its state, in others.
        sequence_length: int, S, steps a row.
        pad_token_id: int, what fills a row's end.

    Returns:
        What `fit` takes of a model without a preprocessor: x, a dict of `"token_ids"`,
        `"padding_mask"` and `"segment_ids"`; y, the next tokens; and sample weights, 0 at padding.
        All are int32 of (rows, S).

    Example:

    ```python
    backbone = keras_xlstm.models.XLSTMBackbone(100, 2, 32, num_heads=2, packed=True)
    lm = keras_xlstm.models.XLSTMCausalLM(backbone)
    lm.fit(*keras_xlstm.utils.pack([[5, 6, 7], [8, 9], [10, 11, 12, 13]], sequence_length=6))
    ```
    """
    check_positive_int(sequence_length=sequence_length)
    check_ids("pad_token_id", [pad_token_id], ndim=1)
    S, documents = sequence_length, _arrays(documents)
    # A piece of n + 1 tokens takes n steps: each predicts the token behind it.
    pieces = [
        document[start : start + S + 1]
        for document in documents
        for start in range(0, len(document) - 1, S)
    ]
    rows = _first_fit([len(piece) - 1 for piece in pieces], S)
    x = {name: np.zeros((len(rows), S), "int32") for name in ("padding_mask", "segment_ids")}
    x["token_ids"] = np.full((len(rows), S), pad_token_id, "int32")
    y = np.full((len(rows), S), pad_token_id, "int32")
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members, 1):
            piece = pieces[member]
            steps = slice(start, start + len(piece) - 1)
            x["token_ids"][row, steps], y[row, steps] = piece[:-1], piece[1:]
            x["padding_mask"][row, steps], x["segment_ids"][row, steps] = 1, number
            start = steps.stop
    return x, y, x["padding_mask"]


def _arrays(documents):
    """Each as an array of token ids."""
    if not isinstance(documents, (list, tuple)):
        raise ValueError(
            "`documents` must be a list of lists of token ids. "
            f"Received: {type(documents).__name__}."
        )
    return [check_ids(f"documents[{n}]", x, ndim=1) for n, x in enumerate(documents)]


def _first_fit(sizes, space):
    """Lists of indices whose sizes sum to at most `space`: largest first, where they fit best."""
    rows, with_space = [], [[] for _ in range(space + 1)]
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        left = next((n for n in range(size, space + 1) if with_space[n]), None)
        if left is None:
            rows.append([])
            row, left = len(rows) - 1, space
        else:
            row = with_space[left].pop()
        rows[row].append(index)
        with_space[left - size].append(row)
    return rows


class StreamDataset(keras.utils.PyDataset):
    """A long series in windows, for truncated back-propagation through time.

    The series is cut into `batch_size` parts of equal length, one a row. Batch i holds the i-th
    window of each part, so that a model of `stateful=True` layers reads every part from its start
    to its end, and only gradients end at a window's border. Train with `shuffle=False`, and with
    `ResetStates()`, which clears the states where the parts start again.

    Args:
        x: array, (T, ...), inputs, a step a row.
        y: array, (T, ...), targets of the steps.
        batch_size: int, parts of the series, as many as rows in the model's batch.
        window: int, steps through which gradients flow.
        **kwargs: of `keras.utils.PyDataset`.

    Steps at the end of the series that fill no whole window in each part are left out.

    Example:

    ```python
    x = np.sin(np.arange(1001) / 5)[:, None]
    inputs = keras.Input(batch_shape=(4, 25, 1))
    y = keras_xlstm.layers.SLSTM(8, return_sequences=True, stateful=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1)(y))
    model.compile("adam", "mse")
    stream = keras_xlstm.utils.StreamDataset(x[:-1], x[1:], batch_size=4, window=25)
    reset = keras_xlstm.utils.ResetStates()
    model.fit(stream, epochs=2, shuffle=False, callbacks=[reset])
    ```
    """

    def __init__(self, x, y, batch_size, window, **kwargs):
        super().__init__(**kwargs)
        check_positive_int(batch_size=batch_size, window=window)
        for name, z in (("x", x), ("y", y)):
            if np.ndim(z) == 0:
                raise ValueError(f"`{name}` must be an array, a step a row. Received: {repr(z)}.")
        if len(x) != len(y):
            raise ValueError(
                f"`x` and `y` must have a row a step each. Received: {len(x)} and {len(y)} rows."
            )
        self.windows = len(x) // (batch_size * window)
        if self.windows < 1:
            raise ValueError(
                "The series must have at least `batch_size * window` steps. Received: "
                f"{len(x)} steps, batch_size={batch_size}, window={window}."
            )
        self.window, self.next = window, 0
        self.x, self.y = (self._parts(np.asarray(z), batch_size) for z in (x, y))

    def _parts(self, z, batch_size):
        steps = self.windows * self.window
        return z[: batch_size * steps].reshape(batch_size, steps, *z.shape[1:])

    def __len__(self):
        return self.windows

    def __getitem__(self, index):
        if index not in (0, self.next):
            raise ValueError(
                "Windows must be read in their order, as each goes on from the states of the one "
                f"before. Received: window {index} instead of {self.next}. Pass `shuffle=False` "
                "to `fit`, and leave `workers` at 1."
            )
        self.next = index + 1
        steps = slice(index * self.window, (index + 1) * self.window)
        return self.x[:, steps], self.y[:, steps]


class ResetStates(keras.callbacks.Callback):
    """Clears the states of all stateful layers before each epoch, evaluation and prediction."""

    def _reset(self, *args, **kwargs):
        for layer in self.model._flatten_layers():
            if getattr(layer, "stateful", False):
                layer.reset_state()

    on_epoch_begin = on_test_begin = on_predict_begin = _reset


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Lets a training that was killed go on, to the same bits as if it had not been.

    Keras' own keeps weights and the optimizer, in a file that a kill can cut off, and beside it
    the epoch, which a kill can leave behind. This one also keeps the states of stateful layers and
    of seed generators, so of dropout, and writes all of it in one file that is old or new.

    An epoch that was not finished is trained again. What no callback can know is where the data
    stand: pass `shuffle=False`, or data that depend on the epoch's number only. Nor does it keep
    what other callbacks count, such as `ReduceLROnPlateau`.

    Args:
        backup_dir: string, a folder for this training alone.
        delete_checkpoint: bool, whether the backup goes when the training is done.

    Example:

    ```python
    model = keras.Sequential([keras.Input((5, 1)), keras_xlstm.layers.SLSTM(4)])
    model.compile("adam", "mse")
    backup = keras_xlstm.utils.BackupAndRestore("backup")
    model.fit(np.ones((8, 5, 1)), np.ones((8, 4)), shuffle=False, callbacks=[backup])
    ```
    """

    def __init__(self, backup_dir, delete_checkpoint=True):
        super().__init__(backup_dir, delete_checkpoint=delete_checkpoint)
        self.path = os.path.join(backup_dir, "backup.npz")

    def _variables(self):
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_train_begin(self, logs=None):
        if not self.model.built:
            raise ValueError(
                "`BackupAndRestore` needs a model that is built. Received: one that is not. Call "
                "it on a batch, or give it an `Input`."
            )
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        if not os.path.exists(self.path):
            return
        variables = self._variables()
        with np.load(self.path, allow_pickle=False) as backup:
            values = [backup[name] for name in backup.files if name.isdigit()]
            epoch, generator = int(backup["epoch"]), backup["generator"]
        if [x.shape for x in values] != [tuple(v.shape) for v in variables]:
            raise ValueError(
                f"'{self.path}' must be a backup of this very model. Received: one of "
                f"{len(values)} variables, for a model of {len(variables)}, or of other shapes. "
                "Pass another `backup_dir`."
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(ops.cast(value, variable.dtype))
        if keras.backend.backend() == "torch":
            torch.set_rng_state(torch.from_numpy(generator))
        self.model._initial_epoch = epoch

    def _save_model(self):
        os.makedirs(self.backup_dir, exist_ok=True)
        values = {}
        for i, v in enumerate(self._variables()):
            is_half = keras.backend.standardize_dtype(v.dtype) == "bfloat16"  # not NumPy's
            values[str(i)] = ops.convert_to_numpy(ops.cast(v, "float32") if is_half else v)
        # There Keras draws the dropout of layers without a seed from a generator of the process.
        is_torch = keras.backend.backend() == "torch"
        generator = torch.get_rng_state().numpy() if is_torch else np.zeros(0, "uint8")
        with saving_file(self.path) as path:
            np.savez(path, epoch=self._current_epoch, generator=generator, **values)
