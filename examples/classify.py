"""Classifies sequences of different lengths, with a mask and in both directions.

    python examples/classify.py                        on JAX
    KERAS_BACKEND=torch python examples/classify.py    on PyTorch, likewise tensorflow

Handwritten digits, read one inked pixel after the other, line by line: 16 to 42 steps of (row,
column, ink). They are tested on digits by other writers. Takes about two minutes on two CPU cores.
Leaves `classify.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hashlib
import time

import keras
import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import keras_xlstm as kx

BATCH = 64
TEST = 517  # the last digits, by other writers than the first; what is left are full batches

# Units are chosen for about equal numbers of parameters.
LAYERS = {
    "LSTM": lambda: keras.layers.LSTM(32),
    "GRU": lambda: keras.layers.GRU(38),
    "SLSTM": lambda: kx.layers.SLSTM(40, num_heads=2),
    "MLSTM": lambda: kx.layers.MLSTM(54, num_heads=2, input_gate_bias=-2.0),
}


def main(epochs=15, digits=None, layers=tuple(LAYERS), seeds=(0, 1), path="classify.png"):
    x, y = load_sequences()
    train, test = slice(0, digits or len(x) - TEST), slice(-(digits or TEST), None)
    print(f"\n{'':8}right: training    test  parameters  seconds")
    rows = {}
    for name in layers:
        runs, start = [], time.time()
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            model = new_model(LAYERS[name](), steps=epochs * len(x[train]) // BATCH)
            fit = model.fit(
                x[train],
                y[train],
                validation_data=(x[test], y[test]),
                batch_size=BATCH,
                validation_batch_size=TEST,
                epochs=epochs,
                verbose=0,
            )
            runs.append(fit.history)
        seconds = (time.time() - start) / len(seeds)
        rows[name] = {key: np.mean([run[key] for run in runs], axis=0) for key in runs[0]}
        print(
            f"{name:8}{100 * rows[name]['accuracy'][-1]:14.1f} %"
            f"{100 * rows[name]['val_accuracy'][-1]:6.1f} %{model.count_params():12}{seconds:9.0f}",
            flush=True,
        )
        check_padding(model, x[test][:50])
    print(f"Means of {len(seeds)} seeds, {keras.backend.backend()} backend.")
    print(f"Padding changes no output, before a digit or behind it. See {path}")
    plot(x[0], rows, path)
    return rows


def load_sequences():
    """Steps (row, column, ink), (1797, 42, 3), zeros behind a digit's last; and what it is."""
    images, y = load_digits(return_X_y=True)
    print("Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, CC BY 4.0;")
    print("the copy in scikit-learn")
    print(f"sha256 {hashlib.sha256(images.astype('uint8').tobytes()).hexdigest()}")
    lengths = (images > 0).sum(axis=1)
    x = np.zeros((len(images), lengths.max(), 3), "float32")
    for image, row in zip(images.reshape(-1, 8, 8), x, strict=True):
        places = np.argwhere(image)
        row[: len(places), :2] = places / 4
        row[: len(places), 2] = image[tuple(places.T)] / 16
    print(f"{len(x)} digits of {lengths.min()} to {lengths.max()} steps")
    return x, y


def new_model(layer, steps):
    model = keras.Sequential(
        [
            keras.Input((None, 3)),
            keras.layers.Masking(),  # steps of zeros do not happen
            keras.layers.Dense(32, activation="gelu"),
            keras.layers.Bidirectional(layer),
            keras.layers.Dense(10),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    model.compile(
        keras.optimizers.Adam(rate, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def check_padding(model, x):
    """Zeros before or behind a digit are the same to a model with a mask."""
    more = x.shape[1] // 2
    behind, before = (np.pad(x, ((0, 0), pad, (0, 0))) for pad in ((0, more), (more, 0)))
    outputs = model.predict_on_batch(np.concatenate([behind, before]))
    distance = np.abs(np.subtract(*np.split(outputs, 2))).max()
    assert distance < 1e-4, f"Padding changes outputs by {distance}."


def plot(sequence, rows, path):
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2))
    steps = sequence[sequence.any(axis=1)]
    down, across = 4 * steps[:, :2].T
    left.plot(across, down, "-", color="lightgray", zorder=0)
    left.scatter(across, down, c=steps[:, 2], cmap="Blues", vmin=-0.3, edgecolors="gray")
    left.set(xlim=(-0.5, 7.5), ylim=(7.5, -0.5), aspect="equal", xticks=[], yticks=[])
    left.set_title(f"A digit, {len(steps)} steps")
    for name, history in rows.items():
        share = 100 * np.array(history["val_accuracy"])
        right.plot(np.arange(1, len(share) + 1), share, label=name)
    right.set(xlabel="epoch", ylabel="% of test digits right")
    right.set_title(f"Test digits, mean of the runs ({keras.backend.backend()})")
    right.legend(loc="lower right")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
