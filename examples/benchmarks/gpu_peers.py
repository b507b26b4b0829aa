"""What others offer on a GPU: `gpu.py` lets ours race against it.

As in `peers.py`, whose other process this is. All are written in torch and run there, also beside
ours in torch: a kernel that breaks takes only its own process with it.
"""

import peers
from device import Torch, timed
from measure import Elsewhere, forward_and_gradient

CHUNKWISE = {  # of mlstm_kernels, with the chunk sizes of which the fastest counts
    "gpu": {"triton_xl_chunk": (64, 128, 256, 512), "triton_limit_chunk": (64, 128)},
    "cpu": {"native_custbw": (16,)},
}


def mlstm(shape, dtype, kind):
    """Runs by name of peer, and the names of those that cannot run with the reason."""
    device, found, missing = Torch(kind), {}, {}
    for offer in (mlstm_kernels, attention, simple_gla):
        try:
            functions, inputs, d_output = offer(device, shape, dtype, missing)
        except Exception as e:
            missing[offer.__name__] = f"{type(e).__name__}: {e}"[:200]
            continue
        for name, function in functions.items():
            found[name] = all_runs(device, function, inputs, d_output)
    return found, missing


def all_runs(device, function, inputs, d_output):
    runs = forward_and_gradient(function, inputs, d_output, "torch")
    runs = {what: timed(device, run) for what, run in runs.items()}
    runs["peak MB"] = lambda: Elsewhere(device.peak_mb(function, inputs, d_output) or 0)
    return runs


def mlstm_kernels(device, shape, dtype, missing):
    import torch
    from mlstm_kernels.torch import get_mlstm_kernel

    B, NH, S, DHQK, DHHV = shape
    wide = [device.normal(B, NH, S, width, dtype=dtype) for width in (DHQK, DHQK, DHHV, DHHV)]
    gates = device.normal(B, NH, S), device.normal(B, NH, S) + 3

    def call(kernel, L):
        return lambda *inputs: kernel(
            *inputs, chunk_size=L, autocast_kernel_dtype=getattr(torch, dtype)
        )

    functions = {}
    for name, chunk_sizes in CHUNKWISE["gpu" if device.name == "cuda" else "cpu"].items():
        try:
            kernel = get_mlstm_kernel(f"chunkwise--{name}")
        except ValueError as e:
            missing[f"mlstm_kernels {name}"] = str(e)
            continue
        functions |= {f"{name}, chunks of {L}": call(kernel, L) for L in chunk_sizes if L <= S}
    return functions, [*wide[:3], *gates], wide[3]


def attention(device, shape, dtype, missing):
    """Causal, with heads of 128, as many as have the width of all values."""
    from torch.nn.functional import scaled_dot_product_attention

    B, NH, S, _, DHHV = shape
    width = min(128, DHHV)
    *qkv, d_output = (device.normal(B, NH * DHHV // width, S, width, dtype=dtype) for _ in range(4))
    name = f"attention, {NH * DHHV // width} heads of {width}"
    return {name: lambda *x: scaled_dot_product_attention(*x, is_causal=True)}, qkv, d_output


def simple_gla(device, shape, dtype, missing):
    """A memory with one forget gate a head, without input gate, normalizer and stabilizer."""
    from fla.ops.simple_gla import chunk_simple_gla

    B, NH, S, DHQK, DHHV = shape
    q, k, v, d_output = (
        device.normal(B, S, NH, width, dtype=dtype) for width in (DHQK, DHQK, DHHV, DHHV)
    )
    log_f = -abs(device.normal(B, S, NH))
    return {"simple GLA": lambda *x: chunk_simple_gla(*x)[0]}, [q, k, v, log_f], d_output


def decode(shape, dtype, kind, copies):
    try:
        from mlstm_kernels.torch import (
            get_available_mlstm_step_kernels,
            get_mlstm_step_kernel,
        )
    except ImportError as e:
        return {}, {"mlstm_kernels": str(e)}
    device, (B, NH, DHQK, DHHV) = Torch(kind), shape
    wide = [device.normal(B, NH, width, dtype=dtype) for width in (DHQK, DHQK, DHHV)]
    gates = device.normal(B, NH, 1), device.normal(B, NH, 1) + 3
    found, missing = {}, {}
    for name in get_available_mlstm_step_kernels():
        kernel = get_mlstm_step_kernel(name)
        states = [
            (device.normal(B, NH, DHQK, DHHV), device.normal(B, NH, DHQK), device.normal(B, NH, 1))
            for _ in range(copies)
        ]
        try:
            runs = device.steps(lambda state: kernel(*wide, *gates, *state), states)
        except Exception as e:
            missing[f"mlstm_kernels {name}"] = f"{type(e).__name__}: {e}"[:200]
            continue
        for how, run in runs.items():
            found[f"step {name}{how}"] = {"step": timed(device, run, steps=copies)}
    return found, missing


def slstm(shape, kind):
    device = Torch(kind)
    found, missing = peers.slstm(*shape, device.name)
    for runs in found.values():
        runs.update({what: timed(device, run) for what, run in runs.items()})
    return found, missing


TABLES = {"gpu mlstm": mlstm, "gpu decode": decode, "gpu slstm": slstm}

if __name__ == "__main__":
    peers.TORCH |= TABLES
    peers.serve(peers.THREADS)
