"""Associative recall: a matrix memory keeps key-value pairs apart, where an LSTM mixes them up.

    python examples/associative_recall.py                        on JAX
    KERAS_BACKEND=torch python examples/associative_recall.py    on PyTorch, likewise tensorflow

A sequence shows pairs of a key and a value, drawn anew for each sequence, and then asks for the
value of every key, in another order: "c 3 a 7 b 1, a? c? b?" has the answers "7 3 1". Three models
of about the same number of weights see the same sequences of 1 to 16 pairs: two mLSTM blocks, two
LSTM layers and a transformer of two layers. The state of an LSTM is a vector, that of an mLSTM a
matrix a head, into which each pair is written as an outer product (Beck et al. 2024,
arXiv:2405.04517, Sec. 4.1; the task is that of arXiv:2312.04927).

Takes two to five minutes on two CPU cores. Leaves the accuracies in `associative_recall.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import keras
import keras_hub
import numpy as np
from matplotlib.figure import Figure

from keras_xlstm.layers import XLSTMBlockStack

STEPS, BATCH, WIDTH = 500, 64, 64
KEYS = VALUES = 32
BLANK = KEYS + VALUES  # the token that fills a sequence up
MAX_PAIRS, TESTS = 16, 256
SHOWN = (1, 2, 4, 6, 8, 12, 16)  # the numbers of pairs in the table


def main():
    start, accuracies = time.time(), {}
    for kind in KINDS:
        keras.utils.set_random_seed(0)
        model = new_model(kind)
        train(model)
        accuracies[kind] = {pairs: accuracy(model, pairs) for pairs in SHOWN}
        print(f"{kind}: {model.count_params()} weights ({time.time() - start:.0f} s)", flush=True)
    print_table(accuracies)
    plot(accuracies, "associative_recall.png")
    print(f"\n{time.time() - start:.0f} s; see associative_recall.png")


def recall(rng, pairs):
    """Sequences of pairs and questions, with the answers.

    Args:
        rng: `np.random.Generator`.
        pairs: int array, (B,), pairs in each sequence, from 1 to MAX_PAIRS.

    Returns:
        x, y and weight, each (B, 3 MAX_PAIRS): keys are tokens from 0, values from KEYS. Targets
        are values, counted from 0, and have the weight 1, where x is a key that is asked for.
    """
    B, P = len(pairs), MAX_PAIRS
    keys = rng.permuted(np.tile(np.arange(KEYS), (B, 1)), axis=1)[:, :P]
    values = rng.integers(VALUES, size=(B, P))
    step, n = np.arange(3 * P), pairs[:, None]
    # In random order, but those of pairs that are not shown last.
    order = np.argsort(rng.random((B, P)) + (np.arange(P) >= n), axis=1)
    order = np.take_along_axis(order, np.clip(step - 2 * n, 0, P - 1), axis=1)
    shown, asked = step < 2 * n, (step >= 2 * n) & (step < 3 * n)
    pair = np.where(shown, step // 2, order)
    pair = np.minimum(pair, P - 1)
    key, value = np.take_along_axis(keys, pair, 1), np.take_along_axis(values, pair, 1)
    x = np.where(shown & (step % 2 == 1), KEYS + value, key)
    x = np.where(shown | asked, x, BLANK)
    return x, np.where(asked, value, 0), asked.astype("float32")


KINDS = ("mLSTM", "LSTM", "attention")


def new_model(kind):
    layers = keras.layers
    tokens = keras.Input((None,), dtype="int32")
    x = layers.Embedding(BLANK + 1, WIDTH, keras.initializers.RandomNormal(stddev=1.0))(tokens)
    if kind == "mLSTM":
        x = XLSTMBlockStack(num_blocks=2, num_heads=2)(x)
    elif kind == "LSTM":
        for _ in range(2):
            x = layers.LSTM(WIDTH, return_sequences=True)(x)
    else:
        x = x + keras_hub.layers.SinePositionEncoding()(x)
        for _ in range(2):
            y = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(num_heads=2, key_dim=16)(y, y, use_causal_mask=True)
            y = layers.Dense(3 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
            x = x + layers.Dense(WIDTH)(y)
        x = layers.LayerNormalization()(x)
    return keras.Model(tokens, layers.Dense(VALUES)(x), name=kind)


def train(model, steps=STEPS, batch=BATCH):
    """Each sequence is seen once. Returns the loss of each of eight parts of the training."""
    rng = np.random.default_rng(0)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=4e-3, warmup_steps=steps // 10
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), loss)
    x, y, weight = recall(rng, rng.integers(1, MAX_PAIRS + 1, size=steps * batch))
    options = dict(batch_size=batch, epochs=8, steps_per_epoch=steps // 8, shuffle=False)
    return model.fit(x, y, sample_weight=weight, verbose=0, **options).history["loss"]


def accuracy(model, pairs):
    """The share of right answers among `pairs` questions."""
    x, y, weight = recall(np.random.default_rng(pairs), np.full(TESTS, pairs))
    guesses = model.predict(x, batch_size=TESTS // 2, verbose=0).argmax(axis=-1)
    return float(((guesses == y) * weight).sum() / weight.sum())


def print_table(accuracies):
    print(f"\nShare of right answers, by the number of pairs ({keras.backend.backend()}):\n")
    print("| model |", *(f"{pairs} |" for pairs in SHOWN))
    print("|---" * (1 + len(SHOWN)) + "|")
    for kind, by_pairs in accuracies.items():
        print(f"| {kind} |", *(f"{by_pairs[pairs]:.2f} |" for pairs in SHOWN))


def plot(accuracies, path):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for kind, by_pairs in accuracies.items():
        axes.plot(*zip(*by_pairs.items(), strict=True), "o-", label=kind)
    axes.axhline(1 / VALUES, color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="pairs shown", ylabel="right answers", ylim=(0, 1.05), xticks=SHOWN)
    axes.set_title(f"Associative recall ({keras.backend.backend()}; dashed: chance)")
    axes.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
