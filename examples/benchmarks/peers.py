"""What others offer: `cpu.py` lets ours race against it.

A table has peers by name; each is a dictionary of what it can run. Those written in torch run in
the same process under the torch backend. Beside JAX and TensorFlow they run in another, which
waits while it is not its turn: one that holds TensorFlow too would crash, since triton, which they
import, brings the same compiler.
"""

import functools
import json
import os
import subprocess
import sys
import types

import numpy as np
from measure import Elsewhere, forward_and_gradient, grown_memory, mlstm_inputs, random, seconds

CHUNK_SIZES = 64, 128
THREADS = os.cpu_count()
SCRIPT = __file__  # of the other process


def peers(backend, table, *args):
    """Peers by name, and the names of those that are not installed with the reason."""
    if backend == "jax" and table in JAX:
        return JAX[table](*args)
    if backend == "torch":
        return TORCH[table](*args)
    return elsewhere(table, *args)


def elsewhere(table, *args):
    """As `peers`, always of the other process, and of a new one where that has ended."""
    try:
        names, missing = ask(["open", table, *args])
    except BrokenPipeError:
        other.cache_clear()
        names, missing = ask(["open", table, *args])

    def run(name, what):
        return lambda: Elsewhere(ask(["run", table, name, what]))

    return {name: {what: run(name, what) for what in runs} for name, runs in names.items()}, missing


def with_missing(name):
    """For functions that import a peer and return what it runs."""

    def wrap(function):
        def run(*args):
            try:
                return function(*args), {}
            except ImportError as e:
                return {}, {name: str(e)}

        return run

    return wrap


@with_missing("mlstm_kernels for torch")
def torch_mlstm(shape):
    import torch
    from mlstm_kernels.torch import chunkwise

    names = "native_autograd", "native_custbw"
    functions = {f"torch {x}": getattr(chunkwise, f"mlstm_chunkwise__{x}") for x in names}
    return mlstm_runs(functions, shape, "torch", torch.float32)


@with_missing("mlstm_kernels for JAX")
def jax_mlstm(shape):
    # Imported beside the native kernels, and itself only with a GPU.
    sys.modules.setdefault("jax_triton", types.ModuleType("jax_triton"))
    from mlstm_kernels.jax.chunkwise import native

    functions = {"mlstm_kernels jax": native.mlstm_chunkwise__native_autograd}
    return mlstm_runs(functions, shape, "jax", "float32")


def mlstm_runs(functions, shape, backend, dtype):
    inputs, d_h = mlstm_inputs(*shape)
    turned = [np.swapaxes(x, 1, 2).copy() for x in (*inputs, d_h)]  # (B, NH, S, ...)

    def call(function, L):
        def run(*inputs):
            h = function(*inputs, chunk_size=L, autocast_kernel_dtype=dtype)
            return h[0] if isinstance(h, tuple) else h

        return run

    return {
        f"{name}, chunks of {L}": forward_and_gradient(
            call(function, L), turned[:5], turned[5], backend
        )
        for name, function in functions.items()
        for L in CHUNK_SIZES
    }


@with_missing("xlstm")
def slstm(B, S, NH, DH, device="cpu"):
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
    ).to(device)
    x = torch.tensor(random(B, S, 4 * NH * DH), device=device, requires_grad=True)
    weights = [x, *cell.parameters()]

    def forward():
        with torch.no_grad():
            cell(x)

    def both():
        torch.autograd.grad(cell(x)[0].sum(), weights)

    return {"xlstm, vanilla, torch": {"forward": forward, "forward+backward": both}}


def hugging_face_model(sizes, mode):
    from transformers import xLSTMConfig, xLSTMForCausalLM

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


@with_missing("transformers")
def train(sizes, token_ids):
    import torch

    model, batch = hugging_face_model(sizes, "train"), torch.tensor(token_ids).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)

    def step():
        optimizer.zero_grad()
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()

    return {"transformers xLSTM, torch": {"step": step}}


@with_missing("transformers")
def generate(sizes, token_ids):
    import torch

    model, batch = hugging_face_model(sizes, "inference").eval(), torch.tensor(token_ids).long()

    def continue_by(count):
        with torch.no_grad():
            model.generate(batch, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return {
        "transformers xLSTM, torch": {
            str(count): functools.partial(continue_by, count) for count in (1, 64)
        }
    }


TORCH = dict(mlstm=torch_mlstm, slstm=slstm, train=train, generate=generate)
JAX = dict(mlstm=jax_mlstm)


# Another process


def ask(question):
    """Of the other process, an answer. A run's is its seconds."""
    print(json.dumps(question), file=other().stdin, flush=True)
    answer = other().stdout.readline()
    if not answer:
        raise BrokenPipeError("the peers' process has ended")
    answer = json.loads(answer)
    if isinstance(answer, dict):
        raise RuntimeError(answer["error"])
    return answer


@functools.cache
def other():
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, SCRIPT, str(THREADS)], **pipes)


def serve(threads):
    """Answers `["open", table, ...]` with names, and `["run", ...]` with seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr
    set_threads(threads)
    opened = {}
    for question in map(json.loads, sys.stdin):
        try:
            if question[0] == "open":
                _, table, *args = question
                opened.pop(table, None)
                opened[table], missing = TORCH[table](*args)
                answer = [{name: list(runs) for name, runs in opened[table].items()}, missing]
            else:
                _, table, name, what = question
                answer = seconds(opened[table][name][what])
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)
        if "CUDA error" in str(answer):  # after which nothing works in this process
            return


def set_threads(count):
    import torch

    torch.set_num_threads(count)


def memory(backend, name, S):
    """As `grown_memory`, of a peer's forward+backward at (1, 4, S, 128, 128)."""
    start, whole = (peers(backend, "mlstm", (1, 4, n, 128, 128))[0][name] for n in (1024, S))
    return grown_memory(start["forward+backward"], whole["forward+backward"])


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve(int(sys.argv[1]))
    else:
        backend, name, S = sys.argv[1:]
        print(*memory(backend, name, int(S)))
