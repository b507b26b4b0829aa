"""How fast everything is on this machine's CPU, beside what others offer.

    KERAS_BACKEND=jax python examples/benchmarks/cpu.py              all tables, about ten minutes
    KERAS_BACKEND=torch python examples/benchmarks/cpu.py mlstm slstm      some
    ... --json results.json --plot sweep.png --threads 2

Tables: mlstm, sweep, memory, slstm, layers, train, generate. In each, contenders take turns, and
the median of the turns is shown with the fastest and the slowest; "first" is the first call, with
compilation. A ratio is the best peer's median over ours: above 1, ours is faster. Peers run on
what they are best at: of several chunk sizes and implementations the fastest counts, in the layout
(B, NH, S, DH) that they take, and in float32 throughout. Peers that are not installed are named.

Memory for new tensors costs as much as the arithmetic where the C library returns it to the system
after each use. To keep it, for all contenders, set

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:\\
glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import peers
from measure import (
    RNG,
    Contender,
    forward_and_gradient,
    grown_memory,
    median_of,
    mlstm_gflop,
    mlstm_inputs,
    one_of,
    positive,
    race,
    random,
)

from keras_xlstm import layers, ops

BACKEND = keras.backend.backend()
SHAPES = {  # B, NH, S, DHQK, DHHV
    "A": (1, 4, 2048, 64, 64),
    "B": (4, 4, 1024, 128, 256),
    "C": (1, 8, 4096, 256, 512),
}
MODELS = {
    "tiny": dict(vocabulary_size=256, num_layers=6, hidden_dim=256, num_heads=4),
    "small": dict(vocabulary_size=50304, num_layers=8, hidden_dim=512, num_heads=4),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", type=one_of(TABLES), help=", ".join(TABLES))
    parser.add_argument("--threads", type=positive, default=os.cpu_count())
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    peers.THREADS = options.threads
    if BACKEND == "torch":
        peers.set_threads(options.threads)
    if options.memory_of:
        return print(*our_memory(options.memory_of))
    settings = dict(
        backend=BACKEND,
        threads=options.threads,
        keras=keras.__version__,
        glibc_tunables=os.environ.get("GLIBC_TUNABLES", ""),
    )
    results = settings | limits()
    for name, value in results.items():
        print(f"{name}: {value}")
    for name in options.tables or TABLES:
        results[name] = TABLES[name]()
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results["sweep"], options.plot)


@functools.cache
def limits():
    """A large matrix product, and reading and writing a large vector."""
    n, x, big = 2048, random(2048, 2048), random(2**26)
    product = forward_and_gradient(keras.ops.matmul, [x, x], x, BACKEND)["forward"]
    add = forward_and_gradient(lambda x: x + 1, [big], big, BACKEND)["forward"]
    return {
        "gemm_gflops": round(2 * n**3 / median_of(product) / 1e9),
        "copy_gb_per_s": round(2 * big.nbytes / median_of(add) / 1e9),
    }


def found_peers(table, *args):
    """Peers' runs by name; says which are not installed."""
    others, missing = peers.peers(BACKEND, table, *args)
    for name, why in missing.items():
        print(f"\npeer missing: {name} ({why})")
    return others


# The tables


def races(title, ours, others, turns, work=None):
    """One race for each thing that ours can do."""
    result = {}
    for what, run in ours.items():
        result[what] = race(
            f"{title}, {what}",
            [Contender("ours", run, ours=True)]
            + [Contender(name, runs[what]) for name, runs in others.items()],
            turns,
            work[what] if work else None,
            limits()["gemm_gflops"],
        )
    return result


def mlstm():
    """Forward and backward at three shapes."""
    return {name: mlstm_shape(name, shape) for name, shape in SHAPES.items()}


def mlstm_shape(name, shape):
    return races(
        f"mLSTM {name} {shape}",
        forward_and_gradient(lambda *x: ops.mlstm(*x), *mlstm_inputs(*shape), BACKEND),
        found_peers("mlstm", shape),
        {"A": 15, "B": 7, "C": 3}[name],
        mlstm_gflop(shape),
    )


def sweep():
    """Time over the length, at NH 4, DHQK 64, DHHV 128."""
    print("\nmLSTM (1, 4, S, 64, 128)")
    rows = {}
    for S in (2**n for n in range(10, 17)):
        inputs = mlstm_inputs(1, 4, S, 64, 128)
        runs = forward_and_gradient(lambda *x: ops.mlstm(*x), *inputs, BACKEND)
        rows[S] = row = {what: 1e3 * median_of(run, 3) for what, run in runs.items()}
        a_step = 1e3 * row["forward+backward"] / S
        print(f"  S = {S:6}", *(f"{what} {ms:8.1f} ms," for what, ms in row.items()), end="")
        print(f" {a_step:6.2f} us a step")
    return rows


def memory():
    """What forward+backward at (1, 4, S, 128, 128) takes, each in its own process."""
    print("\nmemory of mLSTM forward+backward at (1, 4, S, 128, 128)")
    commands = {
        f"ours, S = {S}": [__file__, "--memory-of", str(S), "--threads", str(peers.THREADS)]
        for S in (16384, 65536)
    }
    backend = "jax" if BACKEND == "jax" else "torch"
    for name in found_peers("mlstm", (1, 1, 256, 8, 8)):
        commands[f"{name}, S = 16384"] = [peers.__file__, backend, name, "16384"]
    result = {}
    for name, command in commands.items():
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        if done.returncode:
            print(f"  {name:45} failed: {done.stderr.strip()[-90:]}")
            continue
        kept, more = map(float, done.stdout.split()[-2:])
        result[name] = {"kept": kept, "more": more}
        print(f"  {name:45}{kept:8.0f} MB kept, at most {more:.0f} MB more in a run")
    return result


def our_memory(S):
    def both(S):
        inputs = mlstm_inputs(1, 4, S, 128, 128)
        return forward_and_gradient(lambda *x: ops.mlstm(*x), *inputs, BACKEND)["forward+backward"]

    return grown_memory(both(1024), both(S))


def slstm():
    """The recurrence alone, at (8, 256), 4 heads of 64."""
    B, S, NH, DH = 8, 256, 4, 64
    inputs = [random(B, S, 4, NH, DH), 0.1 * random(NH, DH, 4, DH), random(4, NH, DH)]
    d_h = random(B, S, NH, DH)
    ours = forward_and_gradient(lambda *x: ops.slstm(*x), inputs, d_h, BACKEND)
    others = found_peers("slstm", B, S, NH, DH)
    return races(f"sLSTM ({B}, {S}, {NH} x {DH})", ours, others, 7)


def sequence_layers():
    """Keras layers in a model, against those of Keras."""
    result = {}
    for B, S, units in ((8, 256, 256), (4, 512, 512)):
        x, runs = random(B, S, units), {}
        for layer in (layers.SLSTM, layers.MLSTM, keras.layers.LSTM, keras.layers.GRU):
            model = keras.Sequential([layer(units, return_sequences=True)])
            model.compile("adam", "mse")
            runs[layer.__name__] = {
                "predict": functools.partial(model.predict_on_batch, x),
                "train": functools.partial(model.train_on_batch, x, x),
            }
        title, turns = f"layers ({B}, {S}, {units})", 5
        for what in ("predict", "train"):
            contenders = [Contender(n, r[what], n == "SLSTM") for n, r in runs.items()]
            result[f"{title}, {what}"] = race(f"{title}, {what}", contenders, turns)
    return result


def our_model(size):
    from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

    lm = XLSTMCausalLM(XLSTMBackbone(**MODELS[size]))
    lm.compile(optimizer=keras.optimizers.AdamW(1e-3), weighted_metrics=[], sampler="greedy")
    return lm


def gpt2(size):
    """KerasHub's GPT-2 with about as many parameters."""
    from keras_hub.models import GPT2Backbone, GPT2CausalLM

    sizes = MODELS[size]
    backbone = GPT2Backbone(
        sizes["vocabulary_size"], sizes["num_layers"], 4, sizes["hidden_dim"],
        4 * sizes["hidden_dim"], max_sequence_length=512,
    )  # fmt: skip
    lm = GPT2CausalLM(backbone)
    lm.compile(
        optimizer=keras.optimizers.AdamW(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        sampler="greedy",
    )
    return lm


def token_ids(size, B, S):
    return RNG.integers(0, MODELS[size]["vocabulary_size"], (B, S)).astype("int32")


def prompt(ids, S):
    """What `generate` takes, to end at S tokens."""
    x = {name: np.zeros((len(ids), S), "int32") for name in ("token_ids", "padding_mask")}
    x["token_ids"][:, : ids.shape[1]], x["padding_mask"][:, : ids.shape[1]] = ids, 1
    return x


def train():
    """A step of AdamW on 4 texts of 512 tokens."""
    result = {}
    for size, turns in (("tiny", 7), ("small", 3)):
        ids = token_ids(size, 4, 513)
        x = prompt(ids[:, :-1], 512)
        lm, transformer = our_model(size), gpt2(size)
        ours = {"step": functools.partial(lm.train_on_batch, x, ids[:, 1:])}
        others = found_peers("train", MODELS[size], x["token_ids"].tolist())
        title = f"train, {size}, {lm.count_params()} parameters"
        result[size] = races(title, ours, others, turns)
        result[size]["GPT-2"] = beside(
            transformer, lambda: transformer.train_on_batch(x, ids[:, 1:])
        )
    return result


def generate():
    """128 tokens in, 64 out, batch 1, and the first alone; then ours after longer texts."""
    result = {}
    for size, turns in (("tiny", 7), ("small", 3)):
        ids, lm, transformer = token_ids(size, 1, 128), our_model(size), gpt2(size)

        def more(count, lm=lm, ids=ids):
            return lambda: (lm.generate(prompt(ids, 128 + count), stop_token_ids=None), None)[1]

        ours = {"1": more(1), "64": more(64)}
        others = found_peers("generate", MODELS[size], ids.tolist())
        title = f"generate, {size}, {lm.count_params()} parameters, tokens"
        result[size] = races(title, ours, others, turns)
        result[size]["GPT-2"] = beside(transformer, more(64, transformer))
        start = median_of(ours["1"], 3)
        for count in (64, 1024, 8192) if size == "tiny" else (64, 1024):
            each = 1e3 * (median_of(more(count), 1) - start) / (count - 1)
            result[size][f"ms a token over {count}"] = each
            print(f"  {count:5} tokens: {each:.3f} ms each")
    return result


def beside(model, run):
    """Not a peer: it computes something else."""
    ms = 1e3 * median_of(run, 3)
    print(f"  {f'KerasHub GPT-2, {model.count_params()}':34}{ms:9.1f} ms")
    return ms


def plot(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for what in ("forward", "forward+backward"):
        axes.loglog(list(rows), [row[what] for row in rows.values()], "o-", label=what)
    axes.set(xlabel="steps", ylabel="ms", title=f"mLSTM on {BACKEND}, 4 heads of 64 x 128")
    axes.legend()
    figure.savefig(path, dpi=150)


TABLES = dict(
    mlstm=mlstm,
    sweep=sweep,
    memory=memory,
    slstm=slstm,
    layers=sequence_layers,
    train=train,
    generate=generate,
)

if __name__ == "__main__":
    main()
