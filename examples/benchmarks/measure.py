"""Measuring: what takes turns with what, and for how long."""

import argparse
import ctypes
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RNG = np.random.default_rng(0)


def positive(text):
    """An argument of a command."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def one_of(names):
    """An argument of a command, of which there may be none."""

    def known(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be one of {list(names)}, not {text!r}")
        return text

    return known


@dataclass
class Contender:
    name: str
    run: callable
    ours: bool = False
    is_peer: bool = True  # or else it computes something else


class Elsewhere(float):
    """What a run returns that was timed where it took place: its seconds there."""


def seconds(run):
    start = time.perf_counter()
    result = run()
    return result if isinstance(result, Elsewhere) else time.perf_counter() - start


def median_of(run, turns=7):
    run()
    return float(np.median([seconds(run) for _ in range(turns)]))


def race(title, contenders, turns, work=None, limit=None):
    """Lets contenders take turns; prints and returns milliseconds.

    `work` is in GFLOP, `limit` the GFLOP/s of a large matrix product.
    """
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
        speed = ""
        if work:
            rows[name]["gflops"] = work / median * 1e3
            rows[name]["of_gemm"] = rows[name]["gflops"] / limit
            speed = f"  {rows[name]['gflops']:4.0f} GFLOP/s, {rows[name]['of_gemm']:.2f} of GEMM"
        print(
            f"  {name:34}{median:9.4g} ms ({low:.4g}-{high:.4g})  first {t['first']:5.1f} s"
            f"{speed}  {median / ours:6.2f} of ours"
        )
    for name, why in failed.items():
        print(f"  {name:34} failed: {why}")
    others = [c.name for c in contenders if c.is_peer and not c.ours and c.name in times]
    if failed:
        rows["failed"] = failed
    if others:
        rows["ratio"] = min(rows[name]["median"] for name in others) / ours
        print(f"  best peer / ours: {rows['ratio']:.2f}")
    return rows


def forward_and_gradient(function, inputs, d_output, backend):
    """Two callables that compute, to the end, `function` and all its gradients."""
    if backend == "torch":
        import torch

        inputs = [torch.as_tensor(x).requires_grad_() for x in inputs]
        d_output = torch.as_tensor(d_output)

        def forward():
            with torch.no_grad():
                function(*inputs)

        def both():
            torch.autograd.grad(function(*inputs), inputs, d_output)

        return {"forward": forward, "forward+backward": both}
    if backend == "jax":
        import jax

        inputs, d_output = [jax.numpy.asarray(x) for x in inputs], jax.numpy.asarray(d_output)
        compiled = jax.jit(function)
        gradient = jax.jit(lambda d_output, *inputs: jax.vjp(function, *inputs)[1](d_output))

        def run(function, *args):
            return lambda: (jax.block_until_ready(function(*args)), None)[1]

        return {
            "forward": run(compiled, *inputs),
            "forward+backward": run(gradient, d_output, *inputs),
        }
    import tensorflow as tf

    inputs, d_output = [tf.constant(x) for x in inputs], tf.constant(d_output)

    @tf.function
    def gradient(*inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = function(*inputs)
        return tape.gradient(outputs, inputs, d_output)

    compiled = tf.function(function)
    return {"forward": lambda: compiled(*inputs), "forward+backward": lambda: gradient(*inputs)}


def mlstm_gflop(shape):
    """Of products only, at chunks of 64: two of L x L in the forward pass and five in the backward
    pass, two and four with the state."""
    B, NH, S, DHQK, DHHV = shape
    steps, L = 2e-9 * B * NH * S, 64
    forward = steps * (L * (DHQK + DHHV) + 2 * DHQK * DHHV)
    backward = steps * (L * (3 * DHQK + 2 * DHHV) + 4 * DHQK * DHHV)
    return {"forward": forward, "forward+backward": forward + backward}


def random(*shape):
    return RNG.normal(size=shape).astype("float32")


def mlstm_inputs(B, NH, S, DHQK, DHHV):
    """The arguments of `keras_xlstm.ops.mlstm`, and a gradient of its output."""
    q, k, v = random(B, S, NH, DHQK), random(B, S, NH, DHQK), random(B, S, NH, DHHV)
    return [q, k, v, random(B, S, NH), random(B, S, NH) + 3], random(B, S, NH, DHHV)


def grown_memory(warm_up, run):
    """MB that the process keeps after a run, and what a later run adds to that at most.

    What it keeps is the compiled program and, where a framework has one, its pool of memory.
    `warm_up` loads what there is to load.
    """
    warm_up()
    before = _memory("VmRSS")
    run()
    kept = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run()
    return kept - before, _memory("VmHWM") - kept


def _memory(field):
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1024
