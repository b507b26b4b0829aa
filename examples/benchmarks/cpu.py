"""How fast everything is on this machine's CPU, beside what others offer.

    KERAS_BACKEND=jax python examples/benchmarks/cpu.py              all tables, about ten minutes
    KERAS_BACKEND=torch python examples/benchmarks/cpu.py mlstm slstm      some
    ... --json results.json --plot sweep.png --threads 2

Tables: limits, mlstm, sweep, memory, slstm, layers, train, generate. In each, contenders take
turns, and the median of the turns is shown with the fastest and the slowest. A ratio is the best
peer's median over ours: above 1, ours is faster. Peers run on what they are best at: of several
chunk sizes and implementations the fastest counts, in the layout (B, NH, S, DH) that they take,
and in float32 throughout. Peers that are not installed are named.

Memory for new tensors costs as much as the arithmetic where the C library returns it to the system
after each use. To keep it, for all contenders, set

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:\\
glibc.malloc.trim_threshold=17179869184
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

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
RNG = np.random.default_rng(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", default=[], help=", ".join(TABLES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # one contender of the memory table
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # see `Elsewhere`
    options = parser.parse_args()
    if BACKEND == "torch" or installed("torch"):
        import torch

        torch.set_num_threads(options.threads)
    if options.alone:
        return print(grown_memory(options.alone))
    if options.serve:
        return serve()
    print(f"keras-xlstm on {BACKEND}, {options.threads} threads, keras {keras.__version__}")
    print(f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}")
    results = {name: TABLES[name]() for name in options.tables or TABLES}
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results["sweep"], options.plot)


# Measuring


@dataclass
class Contender:
    name: str
    run: callable
    ours: bool = False


def seconds(run):
    start = time.perf_counter()
    taken = run()  # where it ran, if in another process
    return taken if isinstance(taken, float) else time.perf_counter() - start


def race(title, contenders, turns, work=None):
    """Lets contenders take turns; prints and returns milliseconds. `work` is in GFLOP."""
    times, failed = {}, {}
    for c in contenders:
        try:
            first = seconds(c.run)
        except Exception as e:  # a peer's limits are its own; they are shown, not hidden
            if c.ours:
                raise
            failed[c.name] = f"{type(e).__name__}: {e}"[:90]
            continue
        times[c.name] = {"first": first, "all": []}
        c.run()
    for _ in range(turns):
        for c in contenders:
            if c.name in times:
                times[c.name]["all"].append(1e3 * seconds(c.run))
    ours = next(np.median(times[c.name]["all"]) for c in contenders if c.ours)
    rows = {}
    print(f"\n{title}")
    for name, t in times.items():
        median, low, high = np.median(t["all"]), min(t["all"]), max(t["all"])
        rows[name] = dict(median=median, min=low, max=high, first_call_s=t["first"])
        speed = f"{work / median * 1e3:7.0f} GFLOP/s" if work else ""
        print(
            f"  {name:34}{median:9.1f} ms ({low:.1f}-{high:.1f})  first {t['first']:5.1f} s"
            f"{speed}  {median / ours:6.2f} of ours"
        )
    for name, why in failed.items():
        print(f"  {name:34} failed: {why}")
    peers = [
        r["median"]
        for name, r in rows.items()
        if name not in {c.name for c in contenders if c.ours}
    ]
    if peers:
        rows["ratio"] = min(peers) / ours
        print(f"  best peer / ours: {rows['ratio']:.2f}")
    return rows


def forward_and_gradient(function, inputs, d_output, backend=BACKEND):
    """Two callables that compute, to the end, `function` and all its gradients."""
    if backend == "torch":
        import torch

        inputs = [torch.tensor(x, requires_grad=True) for x in inputs]
        d_output = torch.tensor(d_output)

        def forward():
            with torch.no_grad():
                function(*inputs)

        return forward, lambda: torch.autograd.grad(function(*inputs), inputs, d_output)
    if backend == "jax":
        import jax

        inputs, d_output = [jax.numpy.asarray(x) for x in inputs], jax.numpy.asarray(d_output)
        compiled = jax.jit(function)
        gradient = jax.jit(lambda *inputs: jax.vjp(function, *inputs)[1](d_output))
        return (
            lambda: jax.block_until_ready(compiled(*inputs)),
            lambda: jax.block_until_ready(gradient(*inputs)),
        )
    import tensorflow as tf

    inputs, d_output = [tf.constant(x) for x in inputs], tf.constant(d_output)

    @tf.function
    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        return tape.gradient(outputs, inputs, d_output)

    compiled = tf.function(function)
    return lambda: compiled(*inputs), lambda: gradient(*inputs)


def random(*shape):
    return RNG.normal(size=shape).astype("float32")


def installed(name):
    try:
        __import__(name)
    except Exception:
        return False
    return True


# The tables


def limits():
    """A large matrix product, and a copy."""
    n, x = 2048, random(2048, 2048)
    product, _ = forward_and_gradient(keras.ops.matmul, [x, x], x)
    big = random(2**26)
    copy, _ = forward_and_gradient(lambda x: x + 1, [big], big)
    gemm, add = median_of(product), median_of(copy)
    result = {"gemm_gflops": 2 * n**3 / gemm / 1e9, "copy_gb_per_s": 2 * big.nbytes / add / 1e9}
    print(f"\nlimits: {result['gemm_gflops']:.0f} GFLOP/s, {result['copy_gb_per_s']:.0f} GB/s")
    return result


def median_of(run, turns=7):
    run()
    return float(np.median([seconds(run) for _ in range(turns)]))


def mlstm_inputs(B, NH, S, DHQK, DHHV):
    q, k, v = random(B, S, NH, DHQK), random(B, S, NH, DHQK), random(B, S, NH, DHHV)
    return [q, k, v, random(B, S, NH), random(B, S, NH) + 3], random(B, S, NH, DHHV)


def mlstm_contenders(shape):
    """Triples of a name, whether it is ours, and what computes forward and forward+backward."""
    inputs, d_h = mlstm_inputs(*shape)
    ours = forward_and_gradient(lambda *x: ops.mlstm(*x), inputs, d_h)
    peers = peer_contenders_elsewhere if BACKEND == "tensorflow" else peer_contenders
    return [("ours", True, ours)] + [(name, False, runs) for name, runs in peers(shape)]


def peer_contenders(shape, chunk_sizes=(64, 128)):
    inputs, d_h = mlstm_inputs(*shape)
    turned = [np.swapaxes(x, 1, 2).copy() for x in (*inputs, d_h)]
    return [
        (
            f"{name}, chunks of {L}",
            forward_and_gradient(peer_call(function, L), turned[:5], turned[5], backend),
        )
        for name, backend, function in mlstm_peers()
        for L in chunk_sizes
    ]


# TensorFlow and triton, which the torch peers import, crash each other in one process. So beside
# TensorFlow the peers run in another, which waits while it is not their turn.


def peer_contenders_elsewhere(shape):
    ask = elsewhere()
    return [
        (name, [lambda number=number, which=which: ask([number, which]) for which in (0, 1)])
        for number, name in enumerate(ask(shape))
    ]


@functools.cache
def elsewhere():
    """Starts that process. Returns a function that hands it a question."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", *sys.argv[1:]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"KERAS_BACKEND": "torch"},
    )

    def ask(question):
        print(json.dumps(question), file=process.stdin, flush=True)
        answer = json.loads(process.stdout.readline())
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer

    return ask


def serve():
    """Answers a shape with the names of peers, and [number, 0 or 1] with the seconds it took."""
    answers, sys.stdout = sys.stdout, sys.stderr
    contenders = []
    for question in map(json.loads, sys.stdin):
        try:
            if len(question) > 2:
                contenders = peer_contenders(question)
                answer = [name for name, _ in contenders]
            else:
                number, which = question
                answer = seconds(contenders[number][1][which])
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


def peer_call(function, L):
    def call(*inputs):
        h = function(*inputs, chunk_size=L, autocast_kernel_dtype=float32_of(function))
        return h[0] if isinstance(h, tuple) else h

    return call


def float32_of(function):
    if ".torch." in function.__module__:
        import torch

        return torch.float32
    return "float32"


def mlstm_peers():
    """mlstm_kernels for JAX under JAX, else for torch, which has none for TensorFlow."""
    if BACKEND == "jax":
        # Imported beside the native kernels, and itself only with a GPU.
        sys.modules.setdefault("jax_triton", types.ModuleType("jax_triton"))
        try:
            from mlstm_kernels.jax.chunkwise import native
        except ImportError as e:
            print(f"\npeer missing: mlstm_kernels for JAX ({e})")
            return []
        return [("mlstm_kernels jax", "jax", native.mlstm_chunkwise__native_autograd)]
    try:
        from mlstm_kernels.torch import chunkwise
    except ImportError as e:
        print(f"\npeer missing: mlstm_kernels for torch ({e})")
        return []
    names = ("mlstm_chunkwise__native_autograd", "mlstm_chunkwise__native_custbw")
    return [(f"torch {name[17:]}", "torch", getattr(chunkwise, name)) for name in names]


def mlstm():
    return {name: mlstm_shape(name, shape) for name, shape in SHAPES.items()}


def mlstm_shape(name, shape, turns=None):
    B, NH, S, DHQK, DHHV = shape
    pairs, L = mlstm_contenders(shape), 64
    # Products only, at chunks of 64: two of L x L in the forward pass and five in the backward
    # pass, two and four with the state.
    steps = 2e-9 * B * NH * S
    forward = steps * (L * (DHQK + DHHV) + 2 * DHQK * DHHV)
    both = forward + steps * (L * (3 * DHQK + 2 * DHHV) + 4 * DHQK * DHHV)
    turns = turns or {"A": 15, "B": 7, "C": 3}[name]
    result = {}
    for which, label, work in ((0, "forward", forward), (1, "forward+backward", both)):
        contenders = [Contender(name, runs[which], ours) for name, ours, runs in pairs]
        title = f"mLSTM {name} {shape}, {label}"
        result[label] = race(title, contenders, turns, work)
    return result


def sweep():
    """Time over the length, at NH 4, DHQK 64, DHHV 128."""
    lengths, rows = [2**n for n in range(10, 17)], {}
    for S in lengths:
        inputs, d_h = mlstm_inputs(1, 4, S, 64, 128)
        runs = forward_and_gradient(lambda *x: ops.mlstm(*x), inputs, d_h)
        rows[S] = {"forward": 1e3 * median_of(runs[0], 3), "both": 1e3 * median_of(runs[1], 3)}
        per_step = 1e3 * rows[S]["both"] / S
        print(f"{'' if rows.keys() - {S} else chr(10) + 'sweep' + chr(10)}  S = {S:6}", end="")
        print(
            f"  forward {rows[S]['forward']:8.1f} ms, with backward {rows[S]['both']:8.1f} ms",
            end="",
        )
        print(f", {per_step:6.2f} us a step")
    return rows


def memory():
    """What forward+backward at (1, 4, S, 128, 128) adds to the process, each in its own."""
    print("\nmemory of mLSTM forward+backward at (1, 4, S, 128, 128)")
    # Torch and triton must not meet TensorFlow.
    others = "torch" if BACKEND == "tensorflow" else BACKEND
    peers = ["jax"] if BACKEND == "jax" else TORCH_PEERS
    names = ["ours:16384", "ours:65536"] + [f"{name}:16384" for name in peers]
    result = {}
    for name in names:
        command = [sys.executable, __file__, "--alone", name]
        environment = os.environ | {"KERAS_BACKEND": BACKEND if "ours" in name else others}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(f"  {name:45} failed: {done.stderr.strip()[-90:]}")
            continue
        output = done.stdout
        result[name] = float(output.split()[-1])
        print(f"  {name:45}{result[name]:8.0f} MB")
    return result


def grown_memory(name):
    name, S = name.split(":")
    shape = (1, 4, int(S), 128, 128)
    (inputs, d_h), backend = mlstm_inputs(*shape), BACKEND
    function = lambda *x: ops.mlstm(*x)  # noqa: E731
    if name != "ours":
        _, backend, peer = next(p for p in mlstm_peers() if p[0] == name)
        function = peer_call(peer, 128)
        inputs, d_h = [np.swapaxes(x, 1, 2).copy() for x in inputs], np.swapaxes(d_h, 1, 2).copy()
    axis = 1 if name == "ours" else 2
    start = [x.take(range(256), axis) for x in (*inputs, d_h)]
    forward_and_gradient(function, start[:5], start[5], backend)[1]()  # loads libraries
    _, run = forward_and_gradient(function, inputs, d_h, backend)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_in_mb("VmRSS")
    run()
    return memory_in_mb("VmHWM") - before


def memory_in_mb(field):
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)
    )
    return int(line.split()[1]) / 1024


def slstm():
    """The recurrence alone, at (8, 256), 4 heads of 64."""
    B, S, NH, DH = 8, 256, 4, 64
    inputs = [random(B, S, 4, NH, DH), 0.1 * random(NH, DH, 4, DH), random(4, NH, DH)]
    runs = forward_and_gradient(lambda *x: ops.slstm(*x), inputs, random(B, S, NH, DH))
    pairs = [("ours", True, runs)]
    try:
        import torch
        from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig

        types_ = {f"dtype{x}": "float32" for x in ("", "_b", "_r", "_w", "_g", "_s", "_a")}
        cell = sLSTMCell(
            sLSTMCellConfig(
                hidden_size=NH * DH,
                num_heads=NH,
                backend="vanilla",
                enable_automatic_mixed_precision=False,
                **types_,
            )
        )
        x = torch.tensor(random(B, S, 4 * NH * DH), requires_grad=True)
        weights = [x, *cell.parameters()]

        def forward():
            with torch.no_grad():
                cell(x)

        def both():
            torch.autograd.grad(cell(x)[0].sum(), weights)

        pairs.append(("xlstm, vanilla, torch", False, (forward, both)))
    except ImportError as e:
        print(f"\npeer missing: xlstm ({e})")
    return {
        label: race(
            f"sLSTM ({B}, {S}, {NH} x {DH}), {label}",
            [Contender(name, runs[which], ours) for name, ours, runs in pairs],
            7,
        )
        for which, label in ((0, "forward"), (1, "forward+backward"))
    }


def sequence_layers():
    """Keras layers in a model, against those of Keras."""
    result = {}
    for B, S, units in ((8, 256, 256), (4, 512, 512)):
        x, models = random(B, S, units), {}
        for layer in (layers.SLSTM, layers.MLSTM, keras.layers.LSTM, keras.layers.GRU):
            models[layer.__name__] = keras.Sequential([layer(units, return_sequences=True)])
            models[layer.__name__].compile("adam", "mse")
        for what in ("predict", "train"):
            contenders = [
                Contender(
                    name,
                    (lambda m=m, x=x: m.predict_on_batch(x))
                    if what == "predict"
                    else (lambda m=m, x=x: m.train_on_batch(x, x)),
                    ours=name == "SLSTM",
                )
                for name, m in models.items()
            ]
            result[f"{what} {B, S, units}"] = race(f"layers, {what} {B, S, units}", contenders, 5)
    return result


def our_model(size):
    from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

    lm = XLSTMCausalLM(XLSTMBackbone(**MODELS[size]))
    lm.compile(optimizer=keras.optimizers.AdamW(1e-3), sampler="greedy")
    return lm


def hugging_face_model(size, mode):
    try:
        from transformers import xLSTMConfig, xLSTMForCausalLM
    except ImportError as e:
        print(f"\npeer missing: transformers ({e})")
        return None
    sizes = MODELS[size]
    config = xLSTMConfig(
        vocab_size=sizes["vocabulary_size"],
        hidden_size=sizes["hidden_dim"],
        num_blocks=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        chunkwise_kernel="chunkwise--native_autograd",
        autocast_kernel_dtype="float32",
        mode=mode,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=None,
    )
    return xLSTMForCausalLM(config)


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
        sampler="greedy",
    )
    return lm


def tokens(size, B, S):
    ids = RNG.integers(0, MODELS[size]["vocabulary_size"], (B, S)).astype("int32")
    return ids, {"token_ids": ids[:, :-1], "padding_mask": np.ones((B, S - 1), "int32")}


def train():
    """A step of AdamW on 4 texts of 512 tokens."""
    result = {}
    for size in MODELS:
        ids, x = tokens(size, 4, 513)
        lm, transformer = our_model(size), gpt2(size)
        contenders = [
            Contender(f"ours, {lm.count_params()}", lambda: lm.train_on_batch(x, ids[:, 1:]), True)
        ]
        model = hugging_face_model(size, "train")
        if model is not None:
            import torch

            optimizer, batch = (
                torch.optim.AdamW(model.parameters(), 1e-3),
                torch.tensor(x["token_ids"]).long(),
            )

            def step():
                optimizer.zero_grad()
                model(batch, labels=batch, use_cache=False).loss.backward()
                optimizer.step()

            contenders.append(Contender("transformers xLSTM, torch", step))
        name = f"not a peer: GPT-2, {transformer.count_params()}"
        result[size] = race(f"train, {size}", contenders, 3 if size == "small" else 7)
        result[size][name] = 1e3 * median_of(lambda: transformer.train_on_batch(x, ids[:, 1:]), 3)
        print(f"  {name:34}{result[size][name]:9.1f} ms")
    return result


def generate():
    """128 tokens in, 64 out, batch 1; then our time a token after longer texts."""
    result = {}
    for size in MODELS:
        ids, _ = tokens(size, 1, 128)

        def prompt(length, ids=ids):
            x = {name: np.zeros((1, length), "int32") for name in ("token_ids", "padding_mask")}
            x["token_ids"][:, :128], x["padding_mask"][:, :128] = ids, 1
            return x

        lm, turns = our_model(size), 3 if size == "small" else 7
        inputs = prompt(192)
        contenders = [Contender("ours", lambda: lm.generate(inputs, stop_token_ids=None), True)]
        model = hugging_face_model(size, "inference")
        if model is not None:
            import torch

            model.eval()
            batch = torch.tensor(ids).long()

            def peer():
                with torch.no_grad():
                    model.generate(batch, max_new_tokens=64, min_new_tokens=64, do_sample=False)

            contenders.append(Contender("transformers xLSTM, torch", peer))
        result[size] = race(f"generate, {size}", contenders, turns)
        start = median_of(lambda: lm.generate(prompt(129), stop_token_ids=None), 3)
        for count in (64, 1024, 8192) if size == "tiny" else (64, 1024):
            x = prompt(128 + count)
            lm.generate(x, stop_token_ids=None)
            begin = time.perf_counter()
            lm.generate(x, stop_token_ids=None)
            each = 1e3 * (time.perf_counter() - begin - start) / (count - 1)
            result[size][f"ms a token over {count}"] = each
            print(f"  {count:5} tokens: {each:.3f} ms each")
    return result


def plot(rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label in ("forward", "both"):
        axes.loglog(list(rows), [row[label] for row in rows.values()], "o-", label=label)
    axes.set(xlabel="steps", ylabel="ms", title=f"mLSTM on {BACKEND}, 4 heads of 64 x 128")
    axes.legend()
    figure.savefig(path, dpi=150)


TABLES = dict(
    limits=limits,
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
