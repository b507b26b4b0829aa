"""Trains a small xLSTM on the Python language reference, and lets it write some more of it.

    python examples/quickstart.py                         on JAX
    KERAS_BACKEND=torch python examples/quickstart.py     on PyTorch; or on tensorflow

The text is what `help("topics")` shows, so every Python has it (its license is the PSF's). Takes
two to four minutes on two CPU cores, and leaves a learning curve in `quickstart.png` and the
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

STEPS, EPOCHS = 200, 5  # after each epoch, a fifth of the steps, we look at the validation
BATCH, WINDOW = 12, 256  # texts a step, bytes a text
LEARNING_RATE = 4e-3


def main():
    start = time.time()
    keras.utils.set_random_seed(0)
    training, validation = load_texts()

    print(f"\nThe xLSTM on {keras.backend.backend()}")
    lm = new_model()
    lm.summary()
    starts = np.random.default_rng(0).integers(len(training) - WINDOW - 1, size=STEPS * BATCH)
    history = lm.fit(
        [training[s : s + WINDOW + 1] for s in starts],
        validation_data=(windows(validation), None),
        batch_size=BATCH,
        steps_per_epoch=STEPS // EPOCHS,
        epochs=EPOCHS,
    ).history

    baselines = {
        name: ngram_bits_per_byte(order, as_bytes(training), as_bytes(validation))
        for name, order in {"unigram": 1, "trigram": 3}.items()
    }
    print("\nBits per byte of the validation text")
    for name, bits in {**baselines, "xLSTM": history["val_bits_per_byte"][-1]}.items():
        print(f"  {name:8}{bits:6.3f}")
    plot(history, baselines, "quickstart.png")

    print("\nA sample")
    lm.compile(sampler=keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=0))
    print(lm.generate("The with statement", max_length=400))

    print("\nSaved, loaded, and continued greedily, by both:")
    lm.save_to_preset("quickstart_preset")
    loaded = XLSTMCausalLM.from_preset("quickstart_preset")
    prompts = ["If an exception", "A generator"]
    before, after = (greedy(model, prompts) for model in (lm, loaded))
    assert before == after, f"The reloaded model continues differently: {before} {after}"
    print(*after, sep="\n")
    print(f"\nquickstart.png, quickstart_preset/, {time.time() - start:.0f} s")


def load_texts():
    """Training and validation text: the last tenth of the topics is held out.

    Topics repeat each other: each paragraph is kept where it first stands, so that nothing in
    the validation text was in the training text.
    """
    seen, texts = set(), []
    for name in sorted(topics):
        paragraphs = [p for p in topics[name].split("\n\n") if p not in seen]
        seen.update(paragraphs)
        texts.append("\n\n".join([*paragraphs, ""]))
    ends = np.cumsum([len(text) for text in texts])
    cut = np.searchsorted(ends, 0.9 * ends[-1])
    training, validation = "".join(texts[:cut]), "".join(texts[cut:])
    digest = hashlib.sha256((training + validation).encode()).hexdigest()
    print(f"pydoc_data.topics of Python {platform.python_version()} (PSF license)")
    print(f"{len(training)} characters to learn from, {len(validation)} held out")
    print(f"sha256 {digest}")
    return training, validation


def new_model():
    """Four blocks of the 7B's kind, the second with an sLSTM; one token a byte."""
    tokenizer = XLSTMTokenizer.byte_level()
    backbone = XLSTMBackbone(
        tokenizer.vocabulary_size(), num_layers=4, hidden_dim=128, num_heads=4, slstm_at=[1]
    )
    preprocessor = XLSTMCausalLMPreprocessor(
        tokenizer, sequence_length=WINDOW, add_start_token=False, add_end_token=False
    )
    lm = XLSTMCausalLM(backbone, preprocessor)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=STEPS * 9 // 10, warmup_target=LEARNING_RATE, warmup_steps=STEPS // 10
    )
    lm.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0),
        weighted_metrics=[bits_per_byte],
    )
    return lm


def bits_per_byte(targets, logits):
    nats = keras.ops.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return nats / np.log(2)


def windows(text):
    """Texts that follow each other; the last byte of one is the first of the next."""
    return [text[s : s + WINDOW + 1] for s in range(0, len(text) - WINDOW, WINDOW)]


def as_bytes(text):
    return np.frombuffer(text.encode(), "uint8").astype(int)


def ngram_bits_per_byte(order, training, validation):
    """What a model costs that counts: the frequencies after 0, 1, ... bytes, interpolated.

    The weights of the interpolation are fitted by EM, to the last tenth of the training text,
    which is not counted meanwhile.
    """

    def grams(text, n):
        """Each byte with the n - 1 before it, as one number."""
        text = np.concatenate([np.zeros(n - 1, int), text])
        return sum(text[j : len(text) - n + 1 + j] * 256 ** (n - 1 - j) for j in range(n))

    def predictions(counted, text):
        rows = [np.full(len(text), 1 / 256)]
        for n in range(1, order + 1):
            counts = np.bincount(grams(counted, n), minlength=256**n).reshape(-1, 256)
            before, last = np.divmod(grams(text, n), 256)
            rows.append(counts[before, last] / np.maximum(counts.sum(1)[before], 1))
        return np.array(rows)

    cut = len(training) * 9 // 10
    rows, weights = predictions(training[:cut], training[cut:]), np.full(order + 1, 1 / (order + 1))
    for _ in range(100):
        shares = weights[:, None] * rows
        weights = (shares / shares.sum(0)).mean(1)
    return -np.log2(weights @ predictions(training, validation)).mean()


def greedy(model, prompts):
    model.compile(sampler="greedy")
    return model.generate(prompts, max_length=100)


def plot(history, baselines, path):
    steps = STEPS // EPOCHS * np.arange(1, EPOCHS + 1)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps - STEPS // EPOCHS / 2, history["bits_per_byte"], "o-", label="training")
    axes.plot(steps, history["val_bits_per_byte"], "o-", label="validation")
    for name, bits in baselines.items():
        axes.axhline(bits, color="gray", linestyle="--", linewidth=1)
        axes.text(STEPS, bits, f"{name} model, validation", ha="right", va="bottom", color="gray")
    axes.set(xlabel="training steps", ylabel="bits per byte", xlim=(0, STEPS * 1.02), ylim=0)
    axes.set_title(f"The xLSTM on {keras.backend.backend()}")
    axes.legend(loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
