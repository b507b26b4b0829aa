"""Trains a small xLSTM on the Python language reference, and lets it write some more of it.

    python examples/quickstart.py                        on JAX
    KERAS_BACKEND=torch python examples/quickstart.py    on PyTorch, likewise tensorflow

Takes one to four minutes on two CPU cores. Leaves the learning curve in `quickstart.png` and the
model in `quickstart_preset/`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hashlib
import platform
import time
from pydoc_data.topics import topics

import keras
import keras_hub
import numpy as np
from matplotlib.figure import Figure

from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

EPOCHS, STEPS = 6, 50  # a look at the validation text after every 50 steps
BATCH, WINDOW = 16, 128  # texts a step, bytes a text


def main():
    start = time.time()
    keras.utils.set_random_seed(0)
    training, validation = load_texts()
    baselines = {
        "unigram": ngram_bits_per_byte(1, training, validation),
        "trigram": ngram_bits_per_byte(3, training, validation),
    }

    lm = new_model()
    print(f"{lm.count_params()} parameters, {keras.backend.backend()} backend")
    anywhere = np.random.default_rng(0).integers(
        len(training) - WINDOW, size=EPOCHS * STEPS * BATCH
    )
    in_order = range(0, len(validation) - WINDOW, WINDOW)
    history = lm.fit(
        [training[s : s + WINDOW + 1] for s in anywhere],
        validation_data=([validation[s : s + WINDOW + 1] for s in in_order], None),
        batch_size=BATCH,
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        shuffle=False,
    ).history

    print("\nBits per byte of the validation text:")
    for name, bits in {**baselines, "xLSTM": history["val_bits_per_byte"][-1]}.items():
        print(f"{name:>10} {bits:.3f}")
    plot(history, baselines, "quickstart.png")

    print("\nA sample:")
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=0))
    print(lm.generate("The with statement", max_length=400))

    lm.save_to_preset("quickstart_preset")
    loaded = XLSTMCausalLM.from_preset("quickstart_preset")
    prompts = ["If an exception", "A generator"]
    for model in (lm, loaded):
        model.compile(sampler="greedy")
    before, after = (model.generate(prompts, max_length=100) for model in (lm, loaded))
    assert before == after, f"The reloaded model must continue identically: {before}, {after}"
    print("\nSaved and loaded again, it continues identically:", *after, sep="\n")
    print(f"\n{time.time() - start:.0f} s; see quickstart.png and quickstart_preset/")


def load_texts():
    """The text behind Python's `help("topics")`: the last tenth, by topic, is for validation.

    Topics repeat each other. Each paragraph stays only where it first stands, so that training
    has seen nothing of the validation text.
    """
    seen, texts = set(), []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        texts.append("\n\n".join([*paragraphs, ""]))
    ends = np.cumsum([len(text) for text in texts])
    cut = np.searchsorted(ends, 0.9 * ends[-1])
    training, validation = "".join(texts[:cut]), "".join(texts[cut:])
    print(f"pydoc_data.topics of Python {platform.python_version()}, under the PSF license")
    print(f"sha256 {hashlib.sha256((training + validation).encode()).hexdigest()}")
    print(f"{len(training)} characters for training, {len(validation)} for validation")
    return training, validation


def new_model():
    """Four blocks as in the 7B model, but the second with an sLSTM; each byte is a token."""
    tokenizer = XLSTMTokenizer.byte_level()
    backbone = XLSTMBackbone(
        tokenizer.vocabulary_size(), num_layers=4, hidden_dim=128, num_heads=4, slstm_at=[1]
    )
    preprocessor = XLSTMCausalLMPreprocessor(
        tokenizer, sequence_length=WINDOW, add_start_token=False, add_end_token=False
    )
    lm = XLSTMCausalLM(backbone, preprocessor)
    warmup = EPOCHS * STEPS // 10
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, EPOCHS * STEPS - warmup, warmup_target=6e-3, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0)
    lm.compile(optimizer=optimizer, weighted_metrics=[bits_per_byte])
    return lm


def bits_per_byte(targets, logits):
    nats = keras.ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / np.log(2)


def ngram_bits_per_byte(order, training, validation):
    """What the validation text costs a model that counts.

    Its prediction mixes the frequencies of a byte after the last 0, 1, ... `order - 1` bytes.
    The weights come from EM on the last tenth of the training text, not counted meanwhile.
    """

    def grams(text, n):  # each byte and the n - 1 before it, as one number
        text = np.pad(text, (n - 1, 0))
        return sum(text[n - 1 - j : len(text) - j] * 256**j for j in range(n))

    def predictions(counted, text):
        rows = [np.full(len(text), 1 / 256)]
        for n in range(1, order + 1):
            counts = np.bincount(grams(counted, n), minlength=256**n).reshape(-1, 256)
            context, byte = np.divmod(grams(text, n), 256)
            rows.append(counts[context, byte] / np.maximum(counts.sum(1)[context], 1))
        return np.array(rows)

    training, validation = (
        np.frombuffer(text.encode(), "uint8").astype(int) for text in (training, validation)
    )
    cut = len(training) * 9 // 10
    rows = predictions(training[:cut], training[cut:])
    weights = np.full(order + 1, 1 / (order + 1))
    for _ in range(100):
        shares = weights[:, None] * rows
        weights = (shares / shares.sum(0)).mean(1)
    return -np.log2(weights @ predictions(training, validation)).mean()


def plot(history, baselines, path):
    steps = STEPS * np.arange(1, EPOCHS + 1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps - STEPS / 2, history["bits_per_byte"], "o-", label="training, mean of 50 steps")
    axes.plot(steps, history["val_bits_per_byte"], "o-", label="validation")
    for name, bits in baselines.items():
        axes.axhline(bits, color="gray", linestyle="--", linewidth=1)
        axes.text(steps[-1], bits, f"{name} model", ha="right", va="top", color="gray")
    axes.set(xlabel="step", ylabel="bits per byte", xlim=(0, None), ylim=(0, None))
    axes.set_title(f"A small xLSTM reads the Python reference ({keras.backend.backend()})")
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
