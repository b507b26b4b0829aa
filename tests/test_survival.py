"""What serves or trains for long: threads, seeds, kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

THREADS = 8
NO_TRITON = 'import sys; sys.modules["triton"] = None\n'  # as in `conftest.py`, for other processes
PROMPTS = ["a", "hello", "some more", "x y"]


def new_model(sampler="greedy"):
    preprocessor = XLSTMCausalLMPreprocessor(XLSTMTokenizer.byte_level(), sequence_length=20)
    sizes = dict(num_layers=2, hidden_dim=16, num_heads=2, ffn_round_up_to=8, slstm_at=[1])
    model = XLSTMCausalLM(XLSTMBackbone(258, **sizes), preprocessor)
    model.compile(sampler=sampler)
    return model


def memory():
    """Megabytes that this process keeps."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20


@pytest.mark.parametrize("seconds", [3, pytest.param(120, id="minutes", marks=pytest.mark.long)])
def test_threads_get_the_answers_of_one_alone(seconds):
    alone = [new_model(), new_model()]
    models = [XLSTMCausalLM(model.backbone, model.preprocessor) for model in alone]
    expected = []
    for model, served in zip(alone, models, strict=True):
        served.compile(sampler="greedy")
        served.generate(PROMPTS[0])  # compiled here, or the threads' memory would grow by it
        answers = {prompt: model.generate(prompt) for prompt in PROMPTS}
        expected.append((answers, model.predict(PROMPTS, verbose=0)))
    problems, answered, end = [], [0] * THREADS, time.monotonic() + seconds

    def serve(number):
        rng = np.random.default_rng(number)
        try:
            while time.monotonic() < end or not answered[number]:
                which = int(rng.integers(2))
                answers, logits = expected[which]
                if rng.random() < 0.5:
                    prompt = PROMPTS[rng.integers(len(PROMPTS))]
                    assert models[which].generate(prompt) == answers[prompt]
                else:
                    got = models[which].predict(PROMPTS, verbose=0)
                    np.testing.assert_array_equal(got, logits)
                answered[number] += 1
        except BaseException as e:
            problems.append(repr(e)[:500])

    threads = [threading.Thread(target=serve, args=(n,), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    before = memory()
    for thread in threads:  # a watchdog: one that hangs fails the test
        thread.join(timeout=max(0, end - time.monotonic()) + 60)
    grown = memory() - before
    print(f"{sum(answered)} answers, {grown:.0f} MB more in the last two thirds")
    assert not problems, problems
    assert not any(thread.is_alive() for thread in threads)
    assert all(answered)
    assert grown < 100


def fit_and_sample():
    """Losses, weights and texts of one seed: with dropout, and a random sampler."""
    keras.utils.set_random_seed(7)
    model = new_model("top_k")
    tokens = keras.layers.Embedding(9, 8)(x := keras.Input((6,)))
    dropped = keras.layers.Dropout(0.5)(tokens)
    other = keras.Model(x, keras.layers.Dense(1)(keras.layers.Flatten()(dropped)))
    other.compile("adam", "mse")
    data = np.random.default_rng(0).integers(0, 9, (8, 6))
    losses = other.fit(data, data[:, :1], epochs=2, batch_size=4, verbose=0).history["loss"]
    losses += model.fit(["one text", "another one"], epochs=2, verbose=0).history["loss"]
    weights = [ops.convert_to_numpy(w) for w in model.weights + other.weights]
    return losses, weights, [model.generate("a", stop_token_ids=None) for _ in range(3)]


@pytest.mark.long_on_xla
def test_one_seed_gives_the_same_bits():
    first, second = fit_and_sample(), fit_and_sample()
    assert first[0] == second[0] and first[2] == second[2]
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_array_equal(a, b)


# A training with dropout and shuffled data, as a program: it tells a digest of all weights.
SEEDED = """
import hashlib
import keras, numpy as np
import keras_xlstm as kx
keras.utils.set_random_seed(5)
x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
inputs = keras.Input((6, 4))
y = kx.layers.SLSTM(4, num_heads=2, dropout=0.3, return_sequences=True)(inputs)
y = kx.layers.MLSTM(4, num_heads=2, return_sequences=True)(keras.layers.Dropout(0.3)(y))
model = keras.Model(inputs, y)
model.compile("adam", "mse")
model.fit(x, x, epochs=3, batch_size=4, verbose=0)
weights = [keras.ops.convert_to_numpy(w) for w in model.weights]
assert all(np.isfinite(w).all() for w in weights)
digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
print(digest)
"""
# The same of a language model, its losses and its samples.
SEEDED_MODEL = """
import hashlib
import test_survival
losses, weights, texts = test_survival.fit_and_sample()
told = repr([[loss.hex() for loss in losses], texts]).encode()
digest = hashlib.sha256(b"".join([told, *(w.tobytes() for w in weights)])).hexdigest()
print(digest)
"""


def environment():
    """For other processes, which import this file too."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return os.environ | {"PYTHONPATH": path}


@pytest.mark.long_on_xla
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(SEEDED, id="layers"),
        pytest.param(SEEDED_MODEL, id="model", marks=pytest.mark.long),
    ],
)
def test_one_seed_gives_the_same_bits_in_another_process(code):
    command = [sys.executable, "-c", NO_TRITON + code]
    other = subprocess.run(
        command,
        env=environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    here: dict = {}
    exec(code, here)
    assert other.stdout.split()[-1] == here["digest"]


# A training of stateful layers with dropout, as a program: it writes each epoch's loss.
TRAINING = """
import json, os, signal, sys
import keras, numpy as np
import keras_xlstm as kx
folder, kill_at = sys.argv[1], int(sys.argv[2])
keras.utils.set_random_seed(3)
x = np.sin(np.arange(97) / 5).astype("float32")[:, None]
inputs = keras.Input(batch_shape=(4, 4, 1))
y = kx.layers.SLSTM(8, num_heads=2, return_sequences=True, stateful=True)(inputs)
y = keras.layers.Dropout(0.3)(y)
y = kx.layers.MLSTM(8, num_heads=2, return_sequences=True, stateful=True)(y)
model = keras.Model(inputs, keras.layers.Dense(1)(y))
model.compile("adam", "mse")
class Watch(keras.callbacks.Callback):
    steps = 0
    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        if self.steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def on_epoch_end(self, epoch, logs=None):
        with open(folder + "/losses.jsonl", "a") as f:
            f.write(json.dumps([epoch, logs["loss"]]) + "\\n")
stream = kx.utils.StreamDataset(x[:-1], x[1:], batch_size=4, window=4)
# States go on from one epoch to the next: the backup must have them.
callbacks = [Watch(), kx.utils.BackupAndRestore(folder + "/backup", delete_checkpoint=False)]
model.fit(stream, epochs=4, shuffle=False, verbose=0, callbacks=callbacks)
"""


def train(folder, kill_at):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", NO_TRITON + TRAINING, folder, str(kill_at)]
    return subprocess.run(command).returncode


def train_here(folder, monkeypatch):
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["", str(folder), "0"])
    exec(TRAINING, {})


def losses(folder):
    """The last loss of each epoch: one that was killed before its backup is trained again."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    return dict(map(tuple, map(json.loads, lines)))


@pytest.mark.parametrize(
    "kills", [pytest.param([9], id="one"), pytest.param(6, id="random", marks=pytest.mark.long)]
)
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, kills, monkeypatch):
    train_here(tmp_path / "whole", monkeypatch)
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == [0, 1, 2, 3]
    rng = np.random.default_rng()
    for number, kill_at in enumerate(
        kills if isinstance(kills, list) else rng.integers(1, 25, kills)
    ):
        folder = tmp_path / str(number)
        assert train(folder, int(kill_at)) == -signal.SIGKILL
        train_here(folder, monkeypatch)
        assert losses(folder) == expected, f"killed at step {kill_at}"


def train_presets(lm, folder, epochs):
    """The losses of a training that saves the model after each epoch, and says so."""

    def save(epoch, logs):
        lm.save_to_preset(folder)
        print("saved", flush=True)

    lm.compile(keras.optimizers.SGD(0.5), weighted_metrics=[])
    options = dict(epochs=epochs, batch_size=2, shuffle=False, verbose=0)
    callbacks = [keras.callbacks.LambdaCallback(on_epoch_end=save)]
    texts = ["some text", "and another"] * 2
    return lm.fit(texts, callbacks=callbacks, **options).history["loss"]


TRAIN_PRESETS = """
import sys, keras, test_survival
from keras_xlstm.models import XLSTMCausalLM
test_survival.train_presets(XLSTMCausalLM.from_preset(sys.argv[1]), sys.argv[1], 8)
"""


@pytest.mark.long_on_xla
@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.long)])
def test_training_goes_on_from_the_preset_that_a_kill_left(tmp_path, kills):
    """Which is that of one of the epochs, whole. SGD has no more to remember than weights."""
    lm, rng, epochs = new_model(), np.random.default_rng(), 8
    lm.save_to_preset(tmp_path / "start")

    def weights_of(folder):
        model = XLSTMCausalLM.from_preset(str(folder))
        return model, [ops.convert_to_numpy(w) for w in model.weights]

    kept = [weights_of(tmp_path / "start")[1]]
    expected = []
    for _ in range(epochs):
        expected += train_presets(lm, tmp_path / "whole", 1)
        kept.append([ops.convert_to_numpy(w) for w in lm.weights])
    for number in range(kills):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", folder)
        process = subprocess.Popen(
            [sys.executable, "-c", NO_TRITON + TRAIN_PRESETS, folder],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(rng.integers(1, 4)):
            assert process.stdout.readline() == "saved\n"
        time.sleep(0.3 * rng.random())
        process.kill()
        process.communicate()
        model, weights = weights_of(folder)
        (epoch,) = [n for n, x in enumerate(kept) if all(map(np.array_equal, x, weights))]
        if epoch < epochs:
            assert train_presets(model, folder, epochs - epoch) == expected[epoch:]
