"""Documents packed into rows, and series longer than a gradient reaches."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops
from layer_cases import LAYERS

from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM
from keras_xlstm.models.token_loss import TokenLoss
from keras_xlstm.ops import segment_starts
from keras_xlstm.utils import ResetStates, StreamDataset, pack

DOCUMENTS = [[5, 6, 7], [8, 9], [1], [10, 11, 12, 13], [], [3, 4, 5, 6, 7, 8, 9, 10]]


def test_segment_starts():
    ids = [[1, 1, 2, 2, 0, 1], [0, 0, 3, 3, 3, 3], [7, 7, 7, 7, 7, 7]]
    wanted = [[0, 0, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(segment_starts(np.array(ids)), np.array(wanted, bool))


def test_pack_keeps_every_pair_of_tokens():
    x, y, weight = pack(DOCUMENTS, 5, pad_token_id=99)
    token_ids, mask, ids = x["token_ids"], x["padding_mask"].astype(bool), x["segment_ids"]
    assert token_ids.shape == y.shape == (3, 5)  # 13 pairs do not fit in two rows
    pairs = sorted(zip(token_ids[mask], y[mask], strict=True))
    assert pairs == sorted(p for d in DOCUMENTS for p in itertools.pairwise(d))
    np.testing.assert_array_equal(weight, mask)
    assert (token_ids[~mask] == 99).all() and (ids[~mask] == 0).all()
    for row in range(3):  # in a document, each target is the next input
        same = (ids[row, 1:] == ids[row, :-1]) & mask[row, 1:]
        np.testing.assert_array_equal(y[row, :-1][same], token_ids[row, 1:][same])
    assert [len(pack(d, 5)[1]) for d in ([], [[1]], [[1, 2]] * 5, [[1, 2]] * 6)] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="`sequence_length` must be a positive integer"):
        pack(DOCUMENTS, 0)


@pytest.mark.parametrize("style", ["large", "original"])
def test_packed_documents_train_as_if_apart(style):
    """One step of gradient descent: with several documents a row, and with one."""
    keras.utils.set_random_seed(0)
    sizes = dict(num_layers=2, hidden_dim=16, num_heads=2, ffn_round_up_to=8, slstm_at=[1])
    options = dict(block_style=style, chunk_size=4, **sizes)
    packed = XLSTMCausalLM(XLSTMBackbone(20, packed=True, **options))
    noise = np.random.default_rng(0)
    before = [w + 0.2 * noise.normal(size=w.shape) for w in packed.get_weights()]
    rows = pack(DOCUMENTS, 8)
    assert len(rows[1]) == 2
    parts = [pack([document], 8) for document in DOCUMENTS if len(document) > 1]
    x = {name: np.concatenate([part[0][name] for part in parts]) for name in rows[0]}
    del x["segment_ids"]
    rows_apart = x, *(np.concatenate([part[i] for part in parts]) for i in (1, 2))

    apart = XLSTMCausalLM(XLSTMBackbone(20, **options))
    losses, steps = [], []
    for lm, data in ((packed, rows), (apart, rows_apart)):
        lm.set_weights(before)
        loss = TokenLoss(reduction="sum")
        lm.compile(keras.optimizers.SGD(0.01), loss, weighted_metrics=[])
        losses.append(lm.train_on_batch(*data))
        steps.append([new - old for new, old in zip(lm.get_weights(), before, strict=True)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for one, other in zip(*steps, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())

    # Without the numbers of the documents they do run into each other.
    lm = XLSTMCausalLM.from_config(packed.get_config())
    assert lm.backbone.packed
    lm.set_weights(before)
    mixed = rows[0] | {"segment_ids": np.ones_like(rows[1])}
    difference = ops.convert_to_numpy(lm(rows[0])) - ops.convert_to_numpy(lm(mixed))
    assert np.abs(difference).max() > 0.01


def test_a_packed_model_generates():
    lm = XLSTMCausalLM(XLSTMBackbone(20, 1, 16, num_heads=2, ffn_round_up_to=8, packed=True))
    lm.compile(sampler="greedy")
    inputs = {"token_ids": [[3, 4, 0, 0]], "padding_mask": [[1, 1, 0, 0]]}
    inputs = {name: np.array(value, "int32") for name, value in inputs.items()}
    assert lm.generate(inputs, stop_token_ids=None)["padding_mask"].all()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_stream_is_read_on_across_windows(kind):
    """The loss of an epoch without learning is that of whole parts read at once."""
    keras.utils.set_random_seed(0)
    x = np.random.default_rng(0).normal(size=(2 * 12 + 3, 2)).astype("float32")
    y = np.cumsum(x[:, :1], axis=0)
    layer = LAYERS[kind](4, num_heads=2, return_sequences=True, stateful=True)
    inputs = keras.Input(batch_shape=(2, 4, 2))
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    model.compile(keras.optimizers.SGD(0.0), "mse")
    stream = StreamDataset(x, y, batch_size=2, window=4)
    assert len(stream) == 3

    whole = LAYERS[kind](4, num_heads=2, return_sequences=True)
    long = keras.Input(batch_shape=(2, 12, 2))
    reference = keras.Model(long, keras.layers.Dense(1)(whole(long)))
    reference.set_weights(model.get_weights())
    parts = [z[:24].reshape(2, 12, -1) for z in (x, y)]
    wanted = np.mean((ops.convert_to_numpy(reference(parts[0])) - parts[1]) ** 2)

    options = dict(epochs=2, shuffle=False, callbacks=[ResetStates()], verbose=0)
    history = model.fit(stream, **options, validation_data=stream).history
    losses = [*history["loss"], *history["val_loss"]]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    anew = model.evaluate(stream, verbose=0, callbacks=[ResetStates()])
    np.testing.assert_allclose(anew, wanted, rtol=1e-5)
    goes_on = model.evaluate(stream, verbose=0)
    assert abs(goes_on - anew) > 1e-4  # from where the last one ended


def test_streams_that_cannot_be():
    x = np.zeros((24, 1))
    with pytest.raises(ValueError, match="Received: 24 and 23 rows"):
        StreamDataset(x, x[1:], 2, 4)
    with pytest.raises(ValueError, match="24 steps, batch_size=5, window=5"):
        StreamDataset(x, x, 5, 5)
    stream = StreamDataset(x, x, 2, 4)
    assert len(stream[0]) == len(stream[1]) == 2
    with pytest.raises(ValueError, match="window 1 instead of 2. Pass `shuffle=False`"):
        stream[1]
