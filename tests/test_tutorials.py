"""Five models as tutorials have them: only the class and `num_heads` change."""

import keras
import numpy as np
import pytest

from keras_xlstm.layers import MLSTM, SLSTM

EPOCHS, B, S, D = 25, 16, 10, 4
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2 * B, S, D)).astype("float32")
WORDS = np.where(
    np.arange(S) < RNG.integers(3, S + 1, (2 * B, 1)), RNG.integers(1, 9, X.shape[:2]), 0
)
AGE = np.arange(S)[:, None] - np.arange(S)
RECENT = np.where(AGE >= 0, 0.7 ** np.abs(AGE), 0) @ X[:, :, :1]  # a running average


def many_to_one(LSTM, **options):
    model = keras.Sequential([keras.Input((None, D)), LSTM(16, **options), keras.layers.Dense(1)])
    return model, X, X[:, :, :1].sum(axis=1), "mse"


def many_to_many(LSTM, **options):
    model = keras.Sequential(
        [
            keras.Input((None, D)),
            LSTM(16, return_sequences=True, dropout=0.1, **options),
            LSTM(16, return_sequences=True, **options),
            keras.layers.TimeDistributed(keras.layers.Dense(1)),
        ]
    )
    return model, X, RECENT, "mse"


def encoder_decoder(LSTM, **options):
    source, target = keras.Input((None,), dtype="int32"), keras.Input((None, D))
    embedded = keras.layers.Embedding(9, 8, mask_zero=True)(source)
    _, *state = LSTM(16, return_state=True, **options)(embedded)
    decoded = LSTM(16, return_sequences=True, **options)(target, initial_state=state)
    model = keras.Model([source, target], keras.layers.Dense(1)(decoded))
    count = (WORDS > 4).sum(axis=1)[:, None, None] / 5
    return model, [WORDS, X], X[:, :, :1] + count, "mse"


def stateful_stream(LSTM, **options):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(B, S, D)),
            LSTM(16, return_sequences=True, stateful=True, **options),
            keras.layers.Dense(1),
        ]
    )
    return model, X, RECENT, "mse"


def bidirectional_tagger(LSTM, **options):
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(9, 8, mask_zero=True),
            keras.layers.Bidirectional(LSTM(8, return_sequences=True, **options)),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    is_high = WORDS.sum(axis=1, keepdims=True) / (WORDS > 0).sum(axis=1, keepdims=True) < WORDS
    return model, WORDS, is_high.astype("int32"), "sparse_categorical_crossentropy"


BUILDERS = (many_to_one, many_to_many, encoder_decoder, stateful_stream, bidirectional_tagger)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("layer", ["SLSTM", "MLSTM"])
def test_one_word_changes(layer, build):
    """Both learn, and a model of theirs has the shapes of one with `LSTM`."""
    keras.utils.set_random_seed(1)
    ours = {"SLSTM": SLSTM, "MLSTM": MLSTM}[layer]
    model, x, y, loss = build(ours, num_heads=2)
    assert model.output_shape == build(keras.layers.LSTM)[0].output_shape
    model.compile(keras.optimizers.Adam(0.02), loss)
    losses = model.fit(x, y, batch_size=B, epochs=EPOCHS, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < 0.75 * losses[0]
    assert model.predict(x, batch_size=B, verbose=0).shape[:1] == (2 * B,)
