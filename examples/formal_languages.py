"""Four formal languages: what memory mixing can do, and a layer without it cannot.

    python examples/formal_languages.py                        on JAX
    KERAS_BACKEND=torch python examples/formal_languages.py    on PyTorch, likewise tensorflow

The same small model reads each language with an sLSTM, an mLSTM or causal self-attention inside.
After every symbol it is asked for the answer to what it has read: so each sequence of 40 symbols
trains all lengths up to 40, and one of 256 tests all lengths up to 256. Whoever answers right at
every length has found the automaton behind the language. To carry an automaton's state on, what
was computed at one step must reach the gates of the next, as only the sLSTM's memory mixing lets
it (Beck et al. 2024, arXiv:2405.04517, Sec. 4.1; the tasks are from arXiv:2207.02098).

Takes three to five minutes on two CPU cores. Leaves the accuracies in `formal_languages.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import keras
import keras_hub
import numpy as np
from matplotlib.figure import Figure

from keras_xlstm.layers import MLSTM, SLSTM

STEPS, BATCH, WIDTH = 800, 64, 32
TRAIN_LENGTH, TEST_LENGTH, TESTS = 40, 256, 512
SHOWN = (10, 40, 80, 160, 256)  # the lengths in the table


def main():
    start, accuracies = time.time(), {}
    for language in LANGUAGES:
        for mixer in MIXERS:
            accuracies[language, mixer] = accuracy_by_length(language, mixer)
            row = " ".join(f"{accuracies[language, mixer][n - 1]:.2f}" for n in SHOWN)
            print(f"{language}, {mixer}: {row} ({time.time() - start:.0f} s)", flush=True)
    print_table(accuracies)
    plot(accuracies, "formal_languages.png")
    print(f"\n{time.time() - start:.0f} s; see formal_languages.png")


def parity(rng, shape):
    """Is the number of ones odd?"""
    x = rng.integers(2, size=shape)
    return x, np.cumsum(x, axis=1) % 2


def even_pairs(rng, shape):
    """Is the number of changes between neighbours odd? (It is where first and last differ.)"""
    x = rng.integers(2, size=shape)
    return x, x ^ x[:, :1]


def cycle_navigation(rng, shape):
    """Where on a circle of five places do steps back (0), none (1) and forth (2) lead?"""
    x = rng.integers(3, size=shape)
    return x, np.cumsum(x - 1, axis=1) % 5


def modular_arithmetic(rng, shape):
    """The value modulo 5 of numbers with +, - and * (5, 6, 7) between them, from left to right.

    As a pocket calculator does it: 1 + 2 * 3 gives 9. An operator does not change the value yet.
    """
    x = rng.integers(5, size=shape)
    x[:, 1::2] = rng.integers(5, 8, size=x[:, 1::2].shape)
    y = np.empty_like(x)
    y[:, 0] = x[:, 0]
    for t in range(1, shape[1]):
        value, operator, number = y[:, t - 1], x[:, t - 1], x[:, t]
        results = value + number, value - number, value * number
        y[:, t] = np.select([operator == o for o in (5, 6, 7)], results, default=value) % 5
    return x, y


LANGUAGES = {  # the generator, symbols, answers
    "parity": (parity, 2, 2),
    "even pairs": (even_pairs, 2, 2),
    "cycle navigation": (cycle_navigation, 3, 5),
    "modular arithmetic": (modular_arithmetic, 8, 5),
}
MIXERS = ("sLSTM", "mLSTM", "attention")


def new_model(mixer, symbols, answers):
    """An embedding, one residual block with the mixer and a feed-forward network, and a head."""
    layers = keras.layers
    symbols_in = keras.Input((None,), dtype="int32")
    x = layers.Embedding(symbols, WIDTH, keras.initializers.RandomNormal(stddev=1.0))(symbols_in)
    if mixer == "attention":  # the others know the order without
        x = x + keras_hub.layers.SinePositionEncoding()(x)
    y = layers.LayerNormalization()(x)
    if mixer == "sLSTM":
        # From a recurrent kernel of zeros, the default, mixing would have to be found first.
        mix = dict(num_heads=1, recurrent_initializer="glorot_uniform")
        y = SLSTM(WIDTH, return_sequences=True, **mix)(y)
    elif mixer == "mLSTM":
        y = MLSTM(WIDTH, num_heads=2, key_dim=16, input_gate_bias=0.0, return_sequences=True)(y)
    else:
        y = layers.MultiHeadAttention(num_heads=2, key_dim=16)(y, y, use_causal_mask=True)
    x = x + y
    y = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
    x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(y))
    return keras.Model(symbols_in, layers.Dense(answers)(x), name=mixer)


def accuracy_by_length(language, mixer, steps=STEPS, seed=0):
    """Trains a model; returns the share of right answers after each symbol, (TEST_LENGTH,)."""
    keras.utils.set_random_seed(seed)
    generate, symbols, answers = LANGUAGES[language]
    rng = np.random.default_rng(seed)
    model = new_model(mixer, symbols, answers)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=4e-3, warmup_steps=steps // 10
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), loss)
    x, y = generate(rng, (steps * BATCH, TRAIN_LENGTH))  # each sequence is seen once
    model.fit(x, y, batch_size=BATCH, verbose=0)
    x, y = generate(rng, (TESTS, TEST_LENGTH))
    guesses = model.predict(x, batch_size=TESTS // 4, verbose=0).argmax(axis=-1)
    return (guesses == y).mean(axis=0)


def print_table(accuracies):
    print(
        f"\nTrained on up to {TRAIN_LENGTH} symbols ({keras.backend.backend()}). Accuracy after:\n"
    )
    print("| language | model |", *(f"{n} |" for n in SHOWN))
    print("|---" * (2 + len(SHOWN)) + "|")
    for (language, mixer), accuracy in accuracies.items():
        print(f"| {language} | {mixer} |", *(f"{accuracy[n - 1]:.2f} |" for n in SHOWN))


def plot(accuracies, path):
    figure = Figure(figsize=(8, 5), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (language, (_, _, answers)) in zip(panels, LANGUAGES.items(), strict=True):
        for mixer in MIXERS:
            if (language, mixer) in accuracies:
                accuracy = accuracies[language, mixer]
                smooth = np.convolve(accuracy, np.ones(8) / 8, "valid")  # the mean of 8 lengths
                axes.plot(np.arange(len(smooth)) + 8, smooth, label=mixer)
        axes.axhline(1 / answers, color="gray", linestyle="--", linewidth=1)
        axes.axvspan(0, TRAIN_LENGTH, color="gray", alpha=0.15)
        axes.set(title=language, xlim=(0, None), ylim=(0, 1.05))
    figure.supxlabel("symbols read (gray: lengths trained on; dashed: chance)")
    figure.supylabel("accuracy")
    axes.legend(loc="center right")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
