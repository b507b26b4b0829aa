"""Looks inside a language model while it reads: gates, stabilizer, memory span, matrix memories.

    python examples/look_inside.py                        on JAX
    KERAS_BACKEND=torch python examples/look_inside.py    on PyTorch, likewise tensorflow

Takes the model of `quickstart.py` if that has run here, else trains a smaller one on the Python
language reference, which takes one or two minutes on two CPU cores. Prints each layer's memory
span and the rank of its matrices, and leaves pictures in `look_inside.png`: all numbers come from
`keras_xlstm.inspect`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time
from pathlib import Path
from pydoc_data.topics import topics

import keras
import numpy as np
from matplotlib.figure import Figure

from keras_xlstm import inspect
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

STEPS, BATCH, WINDOW = 300, 16, 96
TEXT = topics["with"].strip()[:240]  # what the model reads while we look


def main():
    start = time.time()
    keras.utils.set_random_seed(0)
    if Path("quickstart_preset").exists():
        print("The model of quickstart.py")
        lm = XLSTMCausalLM.from_preset("quickstart_preset")
    else:
        lm = new_model()
        train(lm)
    traces = look(lm, TEXT)
    print_table(traces)
    plot(traces, TEXT, "look_inside.png")
    print(f"\n{time.time() - start:.0f} s; see look_inside.png")


def new_model(hidden_dim=64):
    """Three blocks, the second with an sLSTM; each byte is a token."""
    tokenizer = XLSTMTokenizer.byte_level()
    backbone = XLSTMBackbone(
        tokenizer.vocabulary_size(), num_layers=3, hidden_dim=hidden_dim, num_heads=4, slstm_at=[1]
    )
    preprocessor = XLSTMCausalLMPreprocessor(
        tokenizer, sequence_length=WINDOW, add_start_token=False, add_end_token=False
    )
    return XLSTMCausalLM(backbone, preprocessor)


def train(lm, steps=STEPS):
    text = "\n\n".join(topics[name] for name in sorted(topics) if name != "with")
    print(f"{len(text)} characters of pydoc_data.topics, under the PSF license")
    rate = keras.optimizers.schedules.CosineDecay(1e-2, steps)
    lm.compile(optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0), weighted_metrics=[])
    starts = np.random.default_rng(0).integers(len(text) - WINDOW, size=steps * BATCH)
    lm.fit([text[s : s + WINDOW + 1] for s in starts], batch_size=BATCH, shuffle=False, verbose=2)


def look(lm, text):
    """One `inspect.Trace` a layer, of one row, a step a byte."""
    token_ids = np.array([lm.preprocessor.tokenizer(text)], "int32")
    return inspect.trace(lm, {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})


def ranks(trace):
    """The effective rank of each head's matrix memory after each step, (S, NH)."""
    return inspect.effective_rank(trace.states()[0][0])


def print_table(traces):
    print(f"\nWhile it reads {len(TEXT)} bytes ({keras.backend.backend()}):\n")
    print("| layer | half-life of heads, in steps | rank of C at the end | of at most |")
    print("|---|---|---|---|")
    for trace in traces:
        lives = trace.half_life()
        if trace.kind == "mlstm":
            C = trace.states([-1])[0][0, 0]  # (NH, DHQK, DHHV)
            lives, rank = ([f"{x:.1f}" for x in y] for y in (lives, inspect.effective_rank(C)))
            size = min(C.shape[1:])
            print(f"| {trace.name} | {', '.join(lives)} | {', '.join(rank)} | {size} |")
        else:  # a gate a unit
            lives = [f"{min(x):.1f} to {max(x):.1f}" for x in lives]
            print(f"| {trace.name} | {', '.join(lives)} | | |")


def plot(traces, text, path):
    """A row a layer: both gates and the stabilizer over the text, and spans or ranks."""
    figure = Figure(figsize=(14, 2.6 * len(traces)), layout="constrained")
    rows = figure.subplots(len(traces), 4, squeeze=False)
    for row, trace in zip(rows, traces, strict=True):
        S = trace.happens.shape[1]
        # (S, heads), or (S, units) where each unit has a gate
        i, forget, m = (x[0].reshape(S, -1) for x in (trace.i, np.exp(trace.log_f), trace.m))
        forget_map = row[0].imshow(forget.T, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(forget_map, ax=row[0])
        row[0].set(title="forget gate", ylabel=trace.name)
        input_map = row[1].imshow(i.T, aspect="auto", interpolation="nearest", cmap="magma")
        figure.colorbar(input_map, ax=row[1])
        row[1].set(title="input gate, nats")
        row[2].plot(m[:, :: max(m.shape[1] // 4, 1)])
        row[2].set(title="stabilizer m, nats", xlim=(0, S))
        if trace.kind == "mlstm":
            row[3].plot(ranks(trace))
            row[3].set(title="rank of C, a line a head", xlim=(0, S), ylim=(0, None))
        else:
            row[3].plot(np.sort(trace.half_life(), axis=-1).T)
            row[3].set(title="half-life of units, a line a head", yscale="log")
    for axes in rows[-1, :3]:
        axes.set(xlabel="bytes read")
    figure.savefig(path, dpi=72)


if __name__ == "__main__":
    main()
