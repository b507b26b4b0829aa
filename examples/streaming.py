"""Feeds an xLSTM sample by sample: constant time and memory, and the numbers of the whole signal.

    python examples/streaming.py                        on JAX
    KERAS_BACKEND=torch python examples/streaming.py    on PyTorch, likewise tensorflow

A stack of two blocks learns where a chaotic signal will be 20 samples later. Then it runs as beside
a sensor: one sample and the state in, one forecast and the next state out. Takes about a minute on
two CPU cores. Leaves `streaming.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import keras
import numpy as np
import psutil
from keras import tree
from matplotlib.figure import Figure

import keras_xlstm as kx
from keras_xlstm.ops.repeated import repeated

AHEAD = 20  # samples from the last one seen to the one to forecast
WINDOW = 128  # samples that a training sequence has, and that a model without a state would read
LAGS = 64  # samples that the linear baseline sees


def main(steps=250, batch_size=16, samples=5000, width=32, path="streaming.png"):
    keras.utils.set_random_seed(0)
    signal = mackey_glass(20_000 + samples + AHEAD)
    training, stream = signal[:20_000], signal[20_000:]
    future, stream = stream[AHEAD:], stream[:-AHEAD]

    model, step, state = new_models(width)
    print(f"{model.count_params()} parameters, {keras.backend.backend()} backend")
    rate = keras.optimizers.schedules.CosineDecay(5e-3, steps)
    model.compile(keras.optimizers.Adam(rate, global_clipnorm=1.0), "mse")
    starts = np.random.default_rng(0).integers(len(training) - WINDOW - AHEAD, size=steps)
    starts = (starts[:, None] + 997 * np.arange(batch_size)) % (len(training) - WINDOW - AHEAD)
    windows = training[starts.reshape(-1, 1) + np.arange(WINDOW + AHEAD), None]
    model.fit(windows[:, :WINDOW], windows[:, AHEAD:], batch_size=batch_size, verbose=2)

    forecasts, seconds, memory = run(compiled(step), state, stream)
    offline = model.predict(stream[None, :, None], verbose=0)[0, :, 0]
    distance = np.abs(forecasts - offline).max()
    assert distance < 1e-4, f"Stepping and the whole signal differ by {distance}."
    again = [
        timed(lambda n=n: model.predict_on_batch(stream[None, n : n + WINDOW, None]))
        for n in range(min(50, samples - WINDOW))
    ]

    kept = sum(x.size for x in map(keras.ops.convert_to_numpy, tree.flatten(state))) * 4 / 1e3
    errors = {
        "the last sample": stream - future,
        f"linear, {LAGS} samples": linear(training, stream) - future,
        "xLSTM, one sample at a time": forecasts - future,
    }
    errors = {name: np.sqrt(np.mean(e[LAGS:] ** 2)) / future.std() for name, e in errors.items()}
    print(f"\nError over {samples} samples that follow the training signal, over its deviation:")
    for name, error in errors.items():
        print(f"{name:>30} {error:.3f}")
    print(f"\nMilliseconds a forecast: {'median':>20} 99 %")
    for name, times in {"one sample": seconds[10:], f"the last {WINDOW} again": again[1:]}.items():
        middle, slow = 1e3 * np.quantile(times, [0.5, 0.99])
        print(f"{name:>30} {middle:14.2f} {slow:.2f}")
    print(f"\nThe state: {kept:.1f} kB. The process: {memory[0]:.1f} MB after 100 samples,")
    print(f"{memory[1]:.1f} MB after {samples}. Largest distance from the whole signal read at")
    print(f"once: {distance:.1e}. See {path}")
    plot(future, forecasts, seconds, path)
    return {"errors": errors, "distance": distance, "seconds": seconds, "memory": memory}


def mackey_glass(length, delay=17, start=500, parts=10):
    """x' = 0.2 x(t - 17) / (1 + x(t - 17)^10) - 0.1 x at t = 0, 1, ..., brought to unit scale."""
    x = np.full(parts * (length + start), 1.2)
    for t in range(parts * delay, len(x) - 1):
        late = x[t - parts * delay]
        x[t + 1] = x[t] + (0.2 * late / (1 + late**10) - 0.1 * x[t]) / parts
    return ((x[parts * start :: parts] - 0.93) / 0.23).astype("float32")


def new_models(width):
    """One for `fit`, and one from [samples, state] to [forecasts, state] with the same weights."""
    embed, head = keras.layers.Dense(width), keras.layers.Dense(1)
    stack = kx.layers.XLSTMBlockStack(num_blocks=2, num_heads=2, slstm_at=(1,))
    signal = keras.Input((None, 1))
    # Keras 3.15 counts a layer's outputs at its first call, so that is one with the state.
    y, _ = stack(embed(signal), return_state=True)
    model = keras.Model(signal, head(y))

    state = stack.get_initial_state(1)
    sample = keras.Input((1, 1))
    before = tree.map_structure(lambda x: keras.Input(x.shape[1:], dtype="float32"), state)
    y, after = stack(embed(sample), initial_state=before, return_state=True)
    return model, keras.Model([sample, before], [head(y), after]), state


def compiled(step):
    """The function (sample, state) -> (forecast, state), as its backend runs it fastest."""
    if keras.backend.backend() == "jax":
        import jax

        weights = [
            [v.value for v in variables]
            for variables in (step.trainable_variables, step.non_trainable_variables)
        ]
        call = jax.jit(lambda weights, inputs: step.stateless_call(*weights, inputs)[0])
        return lambda sample, state: call(weights, [sample, state])
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        call = tf.function(step, jit_compile=True)
        return lambda sample, state: call([tf.constant(sample), state])
    import torch

    call = repeated(lambda sample, state: step([sample, state]), step)  # traced once
    return lambda sample, state: call(torch.from_numpy(sample), state)


def run(step, state, stream):
    """Returns forecasts, seconds of each, and the process' MB after 100 samples and at the end."""
    forecasts, seconds, memory = np.zeros(len(stream), "float32"), np.zeros(len(stream)), []
    for n, sample in enumerate(stream):
        start = time.perf_counter()
        y, state = step(np.full((1, 1, 1), sample), state)
        forecasts[n] = keras.ops.convert_to_numpy(y)[0, 0, 0]
        seconds[n] = time.perf_counter() - start
        if n + 1 in (100, len(stream)):
            memory.append(psutil.Process().memory_info().rss / 1e6)
    return forecasts, seconds, memory


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def linear(training, stream):
    """Least squares on the last `LAGS` samples; 0 before there are as many."""

    def rows(x):
        x = np.lib.stride_tricks.sliding_window_view(x, LAGS)
        return np.concatenate([x, np.ones_like(x[:, :1])], axis=1)

    weights = np.linalg.lstsq(rows(training[:-AHEAD]), training[LAGS - 1 + AHEAD :], rcond=None)[0]
    return np.concatenate([np.zeros(LAGS - 1), rows(stream) @ weights])


def plot(future, forecasts, seconds, path):
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2)
    n = np.arange(len(future))[-400:]
    above.plot(n, future[n], "k", linewidth=1, label="signal")
    above.plot(n, forecasts[n], "C1--", label=f"forecast, {AHEAD} samples before")
    above.set(xlim=(n[0], n[-1]), ylim=(-3.5, 2))
    above.set_title(f"A stream, sample by sample ({keras.backend.backend()})")
    above.legend(loc="lower left", ncols=2)
    below.semilogy(1e3 * seconds[10:], ".", markersize=1)
    below.set(xlabel="sample", ylabel="milliseconds a sample")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
