"""Forecasts sunspots five years ahead, with bands: an xLSTM in the place of an LSTM.

    python examples/forecast.py                        on JAX
    KERAS_BACKEND=torch python examples/forecast.py    on PyTorch, likewise tensorflow

Each model tells five quantiles of the monthly number 3, 6, ... 60 months later, and is judged on 50
years that follow those of its training. Takes two minutes on two CPU cores, on PyTorch five times
that. Leaves a fan chart in `forecast.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hashlib
import time
from pathlib import Path

import keras
import numpy as np
import statsmodels.datasets
from matplotlib.figure import Figure

import keras_xlstm as kx

QUANTILES = np.array([0.1, 0.25, 0.5, 0.75, 0.9], "float32")
AHEAD = np.arange(3, 61, 3)  # months
CYCLE = 132  # months, the mean length of the sun's cycle
WINDOW = 2 * CYCLE  # months that a model sees
FIRST_YEAR, TEST_YEAR = 1749, 1959

# The same two layers' places. Units are chosen for equal numbers of parameters.
MODELS = {
    "LSTM, LSTM": lambda: [
        keras.layers.LSTM(32, return_sequences=True),
        keras.layers.LSTM(32, return_sequences=True),
    ],
    "SLSTM, SLSTM": lambda: [
        kx.layers.SLSTM(38, num_heads=2, return_sequences=True),
        kx.layers.SLSTM(38, num_heads=2, return_sequences=True),
    ],
    "SLSTM, MLSTM": lambda: [
        kx.layers.SLSTM(38, num_heads=2, return_sequences=True),
        kx.layers.MLSTM(48, num_heads=2, input_gate_bias=-2.0, return_sequences=True),
    ],
}


def main(steps=300, batch_size=16, models=tuple(MODELS), seeds=(0, 1), path="forecast.png"):
    series = load_series()
    test = (TEST_YEAR - FIRST_YEAR) * 12  # the first month that no model was trained on
    origins = np.arange(test - 1, len(series) - AHEAD[-1])  # the last months that forecasts see
    truth = series[origins[:, None] + AHEAD]

    print(f"\n{'':15}pinball     MAE  in the 80 % band  parameters  seconds")
    rows, forecasts = {}, {}
    for name, forecast in baselines(series, test, origins).items():
        rows[name] = judge(name, [forecast], truth)
    for name in models:
        forecasts[name], losses = [], []
        start = time.time()
        for seed in seeds:
            keras.utils.set_random_seed(seed)
            model = new_model(MODELS[name]())
            losses.append(train(model, series[:test], steps, batch_size, seed))
            forecasts[name].append(predict(model, series, origins))
        seconds = (time.time() - start) / len(seeds)
        rows[name] = judge(name, forecasts[name], truth, model.count_params(), seconds)
        rows[name]["loss"] = losses
    print(f"Means of {len(seeds)} seeds, {keras.backend.backend()} backend. See {path}")
    plot(series, origins, models[-1], forecasts[models[-1]][0], path)
    return rows


def load_series():
    """Monthly mean sunspot numbers from 1749 to 2008."""
    folder = Path(statsmodels.datasets.__file__).parent
    text = (folder / "sunspots" / "src" / "sunspots_monthly.dat").read_bytes()
    rows = [line.split() for line in text.decode().splitlines()]
    rows = [row[1:] for row in rows if len(row) == 13 and row[0].isdigit()]
    print("Sunspots, by the National Geophysical Data Center, from statsmodels; public domain")
    print(f"sha256 {hashlib.sha256(text).hexdigest()}")
    return np.array(rows, "float32").ravel()


def scaled(sunspots):
    """Roots: the numbers' noise grows with them."""
    return np.sqrt(np.maximum(sunspots, 0)) / 5 - 1


def unscaled(x):
    return (5 * np.maximum(x + 1, 0)) ** 2


def new_model(layers):
    inputs = x = keras.Input((None, 1))
    for layer in layers:
        x = layer(x)
    x = keras.layers.Dense(len(AHEAD) * len(QUANTILES))(x)
    return keras.Model(inputs, keras.layers.Reshape((-1, len(AHEAD), len(QUANTILES)))(x))


def pinball(y, quantiles):
    """The quantile loss: least when a share q of all y lies below the quantile of q."""
    error = keras.ops.expand_dims(y, -1) - quantiles
    q = keras.ops.convert_to_tensor(QUANTILES)
    return keras.ops.mean(keras.ops.maximum(q * error, (q - 1) * error))


def train(model, series, steps, batch_size, seed):
    """Fits forecasts from every month of random windows. Returns the loss of each epoch."""
    starts = np.random.default_rng(seed).integers(
        len(series) - WINDOW - AHEAD[-1] + 1, size=(steps * batch_size, 1)
    )
    months, x = starts + np.arange(WINDOW), scaled(series)
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), pinball)
    y = x[months[..., None] + AHEAD]
    epochs = min(steps, 10)
    return model.fit(
        x[months][..., None],
        y,
        batch_size=batch_size,
        steps_per_epoch=steps // epochs,
        epochs=epochs,
        shuffle=False,
        verbose=0,
    ).history["loss"]


def predict(model, series, origins):
    """Quantiles, (origins, AHEAD, QUANTILES), each from the `WINDOW` months up to its origin."""
    windows = scaled(series)[origins[:, None] + np.arange(1 - WINDOW, 1)][..., None]
    last = keras.Model(model.input, model.output[:, -1])
    return np.sort(unscaled(last.predict_on_batch(windows)))


def baselines(series, test, origins):
    """What the training years alone tell, and the cycle before, with its errors in those years."""

    def cycle_before(months):
        return series[months[:, None] + AHEAD - CYCLE]

    known = np.arange(CYCLE, test - AHEAD[-1])
    errors = series[known[:, None] + AHEAD] - cycle_before(known)
    bands = np.quantile(errors, QUANTILES, axis=0).T
    always = np.quantile(series[:test], QUANTILES)
    return {
        "all years": np.broadcast_to(always, (len(origins), *bands.shape)),
        "seasonal naive": np.maximum(cycle_before(origins)[..., None] + bands, 0),
    }


def judge(name, forecasts, truth, parameters=0, seconds=0.0):
    """Prints and returns a row of the table: means over the forecasts of all seeds."""
    q, y = np.array(forecasts), truth[..., None]
    loss = np.maximum(QUANTILES * (y - q), (QUANTILES - 1) * (y - q)).mean()
    mae = np.abs(truth - q[..., 2]).mean()
    inside = ((q[..., 0] <= truth) & (truth <= q[..., -1])).mean()
    row = f"{name:15}{loss:7.2f}{mae:8.2f}{100 * inside:16.0f} %"
    print(row + f"{parameters:12}{seconds:9.0f}" * bool(parameters), flush=True)
    return dict(pinball=loss, mae=mae, inside=inside, parameters=parameters)


def plot(series, origins, name, forecast, path):
    """A fan every fifth year, beside what came."""
    years = FIRST_YEAR + np.arange(len(series)) / 12
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(years[origins[0] - 60 :], series[origins[0] - 60 :], "k", linewidth=0.7)
    for row in range(0, len(origins), AHEAD[-1]):
        ahead, q = years[origins[row]] + AHEAD / 12, forecast[row]
        for low, high in ((0, 4), (1, 3)):
            axes.fill_between(ahead, q[:, low], q[:, high], color="C0", alpha=0.3, linewidth=0)
        axes.plot(ahead, q[:, 2], "C0")
        axes.axvline(years[origins[row]], color="gray", linewidth=0.5, linestyle=":")
    axes.set(ylabel="sunspots", ylim=(0, None), xlim=(years[origins[0] - 60], years[-1]))
    axes.set_title(
        f"{name}: median, 50 % and 80 % band, each five years from what came before "
        f"({keras.backend.backend()})",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
