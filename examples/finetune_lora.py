"""Teaches a language model new text through adapters of less than 2 % of its weights.

    python examples/finetune_lora.py                        on JAX
    KERAS_BACKEND=torch python examples/finetune_lora.py    on PyTorch, likewise tensorflow

Takes the model of `quickstart.py`, which must have run here before, and the docstrings of the
standard library. Takes half a minute on two CPU cores. Leaves the adapters in
`docstrings.lora.h5`, a file of its own that fits on the untouched model.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import argparse
import ast
import collections
import functools
import statistics

import keras
import numpy as np

from keras_xlstm.models import XLSTMCausalLM

MODULES = (argparse, ast, collections, functools, statistics)
RANK, EPOCHS, BATCH, WINDOW = 4, 3, 16, 128


def main():
    keras.utils.set_random_seed(0)
    training, validation = load_texts()
    lm = XLSTMCausalLM.from_preset("quickstart_preset")
    lm.compile(optimizer=keras.optimizers.Adam(3e-3), sampler="greedy", weighted_metrics=[])
    before = bits_per_byte(lm, validation)

    total = lm.count_params()
    lm.backbone.enable_lora(RANK)
    trained = sum(int(np.prod(w.shape)) for w in lm.trainable_variables)
    print(f"{trained} of {total} weights are trained: {100 * trained / total:.1f} %")
    lm.compile(optimizer=keras.optimizers.Adam(3e-3), sampler="greedy", weighted_metrics=[])
    lm.fit(training, batch_size=BATCH, epochs=EPOCHS)
    after = bits_per_byte(lm, validation)
    print(f"Bits per byte of new text: {before:.3f} before, {after:.3f} after")

    lm.backbone.save_lora_weights("docstrings.lora.h5")
    again = XLSTMCausalLM.from_preset("quickstart_preset")
    again.compile(sampler="greedy")
    again.backbone.load_lora_weights("docstrings.lora.h5")
    prompt = "Return the "
    texts = [model.generate(prompt, max_length=80) for model in (lm, again)]
    assert texts[0] == texts[1], f"The loaded adapters must continue identically: {texts}"
    print(texts[0])


def load_texts():
    """Docstrings, in windows of one length; the last tenth is for validation."""
    seen = {}
    for module in MODULES:
        for thing in [module, *vars(module).values()]:
            if isinstance(getattr(thing, "__doc__", None), str):
                seen[thing.__doc__] = None
    text = "\n\n".join(seen).encode("ascii", "ignore").decode()
    windows = [text[s : s + WINDOW + 1] for s in range(0, len(text) - WINDOW, WINDOW)]
    cut = len(windows) * 9 // 10
    print(f"{len(text)} characters of docstrings, {len(windows) - cut} windows for validation")
    return windows[:cut], windows[cut:]


def bits_per_byte(lm, texts):
    return float(lm.evaluate(texts, batch_size=BATCH, verbose=0)) / np.log(2)


if __name__ == "__main__":
    main()
