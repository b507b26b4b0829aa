"""Trains on several processes as on several hosts, and goes on after one was killed. For JAX.

python examples/train_distributed.py

Three runs of one training: in one process; in two, each with its half of every batch; and in two
of which one is killed on the way, started again from the last checkpoint. All give the same losses.
On a cluster each host runs `worker` with its own number, and nothing else changes.

Text: the Python language reference from `pydoc_data` of the Python that runs this (PSF licence).
Leaves nothing behind. Takes about two minutes on two CPU cores.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
STEPS, BATCH, LENGTH = 5, 8, 64  # of an epoch, rows, bytes


def worker(number, processes, address, folder, epochs):
    """What each process runs; `folder` is shared by all."""
    import keras

    if processes > 1:
        keras.distribution.initialize(address, processes, number)
    import jax
    import numpy as np

    from keras_xlstm.layers import XLSTMBlockStack

    everywhere = keras.distribution.DataParallel(devices=jax.devices(), auto_shard_dataset=False)
    keras.distribution.set_distribution(everywhere)
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(256, 64)(tokens)
    x = XLSTMBlockStack(num_blocks=2, num_heads=4, slstm_at=(1,))(x)
    model = keras.Model(tokens, keras.layers.Dense(256)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(3e-3), loss)

    class Batches(keras.utils.PyDataset):
        """This process' rows of the batches of an epoch, which depend on nothing but its number."""

        epoch = 0

        def __len__(self):
            return STEPS

        def __getitem__(self, step):
            text = np.frombuffer(reference(), "uint8")
            starts = np.random.default_rng((self.epoch, step)).integers(
                len(text) - LENGTH - 1, size=BATCH
            )
            mine = starts[number::processes]
            rows = np.stack([text[s : s + LENGTH + 1] for s in mine]).astype("int32")
            return rows[:, :-1], rows[:, 1:]

        def on_epoch_end(self):
            self.epoch += 1

    class Checkpoint(keras.callbacks.BackupAndRestore):
        def on_train_begin(self, logs=None):
            super().on_train_begin(logs)
            batches.epoch = self.model._initial_epoch or 0

    # To save takes all processes, since arrays are everybody's. All go on from what the first one
    # saved: one that was killed may have saved less.
    saved, first = (Path(folder, f"backup-{x}") for x in (number, 0))
    if number > 0 and first.exists():
        shutil.copytree(first, saved, dirs_exist_ok=True)

    def report(epoch, logs):
        if number == 0:
            with Path(folder, "losses.txt").open("a") as file:
                print(json.dumps([epoch, logs["loss"]]), file=file, flush=True)

    batches = Batches()
    model.fit(
        batches,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=[
            Checkpoint(saved, delete_checkpoint=False),
            keras.callbacks.LambdaCallback(on_epoch_end=report),
        ],
    )


def reference():
    from pydoc_data import topics

    return "\n".join(text for _, text in sorted(topics.topics.items())).encode()


def start(processes, folder, epochs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--processes", str(processes), "--address", address]
    command += ["--epochs", str(epochs), "--folder", folder]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen([*command, "--worker", str(n)], env=environment) for n in range(processes)
    ]


def losses(folder):
    path = Path(folder, "losses.txt")
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(json.loads(line) for line in lines)


def train(processes, epochs, killed_after=None):
    """The losses of all epochs."""
    with tempfile.TemporaryDirectory() as folder:
        running = start(processes, folder, epochs)
        if killed_after is not None:
            while killed_after not in losses(folder):
                time.sleep(0.05)
            running[-1].send_signal(signal.SIGKILL)
            for process in running:  # the others wait for it, in vain
                process.kill()
                process.wait()
            print(f"killed after epoch {max(losses(folder))}, started again")
            running = start(processes, folder, epochs)
        if any([process.wait() for process in running]):
            raise SystemExit("A process failed.")
        return [loss for _, loss in sorted(losses(folder).items())]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, choices=(1, 2, 4, 8), default=2)
    parser.add_argument("--epochs", type=int, default=8, help="2 or more")
    parser.add_argument("--worker", type=int, help="the number of this process")
    parser.add_argument("--address", help="of the first process: host:port")
    parser.add_argument("--folder", help="for checkpoints, shared by all")
    options = parser.parse_args()
    if options.epochs < 2:  # a process is killed half-way
        parser.error(f"argument --epochs: must be 2 or more, not {options.epochs}")
    if options.worker is not None:
        if None in (options.address, options.folder):
            parser.error("argument --worker: needs --address and --folder")
        this = options.worker, options.processes, options.address
        return worker(*this, options.folder, options.epochs)

    many, epochs = options.processes, options.epochs
    runs = {
        "one process": train(1, epochs),
        f"{many} processes": train(many, epochs),
        f"{many} processes, killed": train(many, epochs, killed_after=epochs // 2 - 1),
    }
    for name, values in runs.items():
        print(f"{name:24}", " ".join(f"{x:.6f}" for x in values))
    first = runs["one process"]
    pairs = [pair for values in runs.values() for pair in zip(values, first, strict=True)]
    furthest = max(abs(x / y - 1) for x, y in pairs)
    print(f"furthest from one process: {furthest:.1e}, relative")
    if not furthest < 1e-5:
        raise SystemExit("The losses should be equal.")


if __name__ == "__main__":
    main()
