"""What each quantization of the quickstart model costs and saves.

    KERAS_BACKEND=jax python examples/benchmarks/quantization.py

Needs `quickstart_preset/`, which `examples/quickstart.py` leaves. Prints a table: bytes of the
weights, seconds to score the validation text, milliseconds a generated token, perplexity a byte.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from keras.quantizers import AWQConfig, GPTQConfig
from quickstart import WINDOW, load_texts

from keras_xlstm.models import XLSTMCausalLM

MODES = (None, "int8", "int4", "float8", "gptq", "awq")


def main(modes):
    if unknown := set(modes) - set(MODES):
        raise SystemExit(f"No mode is called {sorted(unknown)}. There are: {list(MODES[1:])}.")
    training, validation = load_texts()
    texts = [validation[s : s + WINDOW + 1] for s in range(0, len(validation) - WINDOW, WINDOW)]
    print("| mode | MB | seconds | ms a token | perplexity | change |")
    print("|---|---|---|---|---|---|")
    plain = None
    for mode in modes:
        lm = XLSTMCausalLM.from_preset("quickstart_preset")
        if mode:
            lm.quantize(mode, config=calibration(mode, lm, training))
        lm.compile(sampler="greedy", weighted_metrics=[])
        megabytes = sum(np.prod(w.shape) * np.dtype(w.dtype).itemsize for w in lm.weights) / 1e6
        perplexity = np.exp(lm.evaluate(texts, verbose=0))
        start = time.time()
        lm.evaluate(texts, verbose=0)
        seconds = time.time() - start
        lm.generate("If an exception", max_length=WINDOW, stop_token_ids=None)
        start = time.time()
        lm.generate("If an exception", max_length=WINDOW, stop_token_ids=None)
        per_token = (time.time() - start) / (WINDOW - 15) * 1e3
        plain = plain or perplexity
        print(
            f"| {mode or 'float32'} | {megabytes:.2f} | {seconds:.1f} | {per_token:.1f} "
            f"| {perplexity:.3f} | {100 * (perplexity / plain - 1):+.1f} % |",
            flush=True,
        )


def calibration(mode, lm, text):
    if mode not in ("gptq", "awq"):
        return None
    kind = GPTQConfig if mode == "gptq" else AWQConfig
    return kind(
        dataset=[text[:20_000]],
        tokenizer=lm.preprocessor.tokenizer,
        num_samples=16,
        sequence_length=WINDOW,
        group_size=64,
    )


if __name__ == "__main__":
    main([None, *sys.argv[1:]] if sys.argv[1:] else MODES)
