"""Trains at 65,536 tokens a sequence, then reads a million in a stream, in the memory of a few.

    python examples/long_context.py                        on JAX
    KERAS_BACKEND=torch python examples/long_context.py    on PyTorch, likewise tensorflow

Two language models of the same size learn from the same bytes of Python's standard library: one in
windows of 512, one in windows of 65,536; a step reads as many tokens either way. Both then read
1,000,000 bytes of other files, piece by piece with a state, and beside that with a fresh state
every 512 bytes. Takes about a quarter of an hour on two CPU cores. Leaves `long_context.png`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hashlib
import itertools
import platform
import resource
import sys
import sysconfig
import time
from pathlib import Path

import keras
import numpy as np
import psutil
from matplotlib.figure import Figure

from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

SHORT, LONG = 512, 65_536  # tokens of a training sequence
STREAM, PIECE = 1_000_000, 8_000  # tokens read, and tokens read at a time
STEPS = 100
EDGES = (0, 512, 8_000, 65_536, 250_000, 500_000, 1_000_000)  # positions that the table parts


def main():
    training, stream = load_texts()
    curves, costs, memory = {}, {}, {}
    for window in (SHORT, LONG):
        keras.utils.set_random_seed(0)
        lm = new_model()
        costs[window] = train(lm, training, window)
        reader = Reader(lm)
        bits, memory[window] = reader.bits(stream)
        curves[f"trained at {window:,}, one state"] = bits
        curves[f"trained at {window:,}, fresh every {SHORT}"] = reader.bits_afresh(stream)
    print_tables(costs, curves, memory, lm.count_params())
    plot(curves, memory, "long_context.png")


def load_texts():
    """Sources of the standard library, in the order of their names' hashes, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in folder.rglob("*.py") if "site-packages" not in p.parts]
    names = {p.relative_to(folder).as_posix(): p for p in paths}
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    data = b"".join(names[name].read_bytes() for name in order)
    print(f"Sources of the standard library of Python {platform.python_version()}, PSF license")
    print(f"sha256 {hashlib.sha256(data).hexdigest()}, {len(data)} bytes; the first are the stream")
    data = np.frombuffer(data, "uint8").astype("int32")
    return data[STREAM:], data[:STREAM]


def new_model():
    """Two blocks as in the 7B model; each byte is a token."""
    return XLSTMCausalLM(XLSTMBackbone(256, num_layers=2, hidden_dim=64, num_heads=4))


def train(lm, training, window):
    """Returns seconds a step and the MB that the process had at its peak.

    Of the tokens of a step, all windows together, there are `LONG` for any window.
    """
    starts = np.random.default_rng(0).integers(len(training) - LONG, size=STEPS)
    texts = np.stack([training[s : s + LONG] for s in starts])
    targets = np.stack([training[s + 1 : s + LONG + 1] for s in starts])
    texts, targets = (x.reshape(-1, window) for x in (texts, targets))
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, STEPS - STEPS // 10, warmup_target=6e-3, warmup_steps=STEPS // 10
    )
    lm.compile(keras.optimizers.AdamW(rate, beta_2=0.95, global_clipnorm=1.0))
    clock = Clock()
    inputs = {"token_ids": texts, "padding_mask": np.ones_like(texts)}
    lm.fit(inputs, targets, batch_size=LONG // window, shuffle=False, verbose=2, callbacks=[clock])
    return {"seconds": np.median(clock.seconds), "peak": peak_memory()}


class Clock(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def peak_memory():
    """MB of this process, at most so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


class Reader:
    """Says what each byte of a text costs, in bits, given those before it."""

    def __init__(self, lm):
        self.model = lm.step_model(None)

    def bits(self, stream):
        """With one state from first to last byte; and the process' MB after each piece."""
        bits, memory, states = [], [], self.fresh(1)
        for start in range(0, len(stream) - 1, PIECE):
            tokens = stream[start : start + PIECE]
            logits, *states = self.model.predict_on_batch([tokens[None], *states])
            bits.append(cost(logits[0], stream[start + 1 : start + PIECE + 1]))
            memory.append(psutil.Process().memory_info().rss / 1e6)
        return np.concatenate(bits), memory

    def bits_afresh(self, stream):
        """With a fresh state every `SHORT` bytes: the most that a window of that size can know."""
        rows = PIECE // SHORT
        bits, states = [], self.fresh(rows)
        for start in range(0, len(stream) - rows * SHORT, rows * SHORT):
            end = start + rows * SHORT
            logits, *_ = self.model.predict_on_batch([stream[start:end].reshape(rows, -1), *states])
            bits.append(cost(logits.reshape(-1, 256), stream[start + 1 : end + 1]))
        return np.concatenate(bits)

    def fresh(self, rows):
        return [np.zeros((rows, *x.shape[1:]), "float32") for x in self.model.inputs[1:]]


def cost(logits, targets):
    nats = keras.ops.sparse_categorical_crossentropy(
        targets, logits[: len(targets)], from_logits=True
    )
    return keras.ops.convert_to_numpy(nats) / np.log(2)


def print_tables(costs, curves, memory, parameters):
    print(f"\n{parameters} parameters, {keras.backend.backend()} backend")
    print("A training step of 65,536 tokens, in sequences of")
    for window, c in costs.items():
        print(f"{window:>8,}: {c['seconds']:6.2f} s, the process at most {c['peak']:.0f} MB so far")
    after, end = memory[SHORT][len(memory[SHORT]) // 10], memory[SHORT][-1]
    print(f"A stream: {after:.0f} MB after its first tenth, {end:.0f} MB at its end")
    print("\nPerplexity a byte, by the position in the stream:")
    parts = list(itertools.pairwise(EDGES))
    print("| | " + " | ".join(f"{a:,} to {b:,}" for a, b in parts) + " |")
    print("|---" * (len(parts) + 1) + "|")
    for name, bits in curves.items():
        row = [f"{2 ** bits[a:b].mean():.2f}" if len(bits) > a else "" for a, b in parts]
        print(f"| {name} | " + " | ".join(row) + " |")


def plot(curves, memory, path):
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    for (name, bits), style in zip(curves.items(), ("C0", "C0:", "C1", "C1:"), strict=True):
        means = [2 ** part.mean() for part in np.array_split(bits, 40)]
        above.plot((np.arange(40) + 0.5) * len(bits) / 40, means, style, label=name)
    above.set(ylabel="perplexity a byte", ylim=(1, None))
    above.set_title(f"A million bytes of other files ({keras.backend.backend()})")
    above.legend()
    for megabytes in memory.values():  # in the colours of above
        below.plot(PIECE * np.arange(1, len(megabytes) + 1), megabytes)
    below.set(xlabel="bytes read", ylabel="MB of the process", ylim=(0, None))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
