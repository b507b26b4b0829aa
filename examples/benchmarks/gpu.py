"""How fast the kernels are on a GPU, beside what others offer and what the GPU can do.

    python examples/benchmarks/kernels.py --device gpu                      all tables
    KERAS_BACKEND=jax python examples/benchmarks/kernels.py --device gpu headline decode
    ... --dtypes bfloat16 float32 --json results.json
    python examples/benchmarks/kernels.py --device cpu --tiny              whether this works

Tables: headline, lengths, widths, batches, decode, slstm, errors. A row names the kernel that
served the call. In the first four, it is a forward pass, and one with all gradients; the time is
the median of several turns with the fastest and the slowest, by CUDA events (under JAX, until the
results are there). Beside it stand

- `mlstm_kernels`, of several chunk sizes the fastest: its time over ours is the ratio;
- causal attention of as many values, and simple GLA of flash-linear-attention, which compute
  something else and are in no ratio;
- the share of the rate of a large matrix product of that dtype, and in `decode` of the bandwidth of
  a large copy, both of the same run.

Peers that are not installed, or fail, are named with the reason. Everything goes into a JSON file,
by default `results/gpu-BACKEND.json` where all tables were run.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peers need some of it

import device as devices
import gpu_peers
import keras
import numpy as np
import peers
from measure import Contender, forward_and_gradient, mlstm_gflop, one_of, positive, race

from keras_xlstm import kernels, ops

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parents[1] / "tests"))
import oracle  # noqa: E402

BACKEND = keras.backend.backend()
DTYPES = "bfloat16", "float16", "float32"

# B, NH, S, DHQK, DHHV
SHAPES = {
    "headline": [(8, 8, 8192, 256, 512), (4, 4, 16384, 128, 256)],
    "lengths": [(4, 8, S, 128, 256) for S in (512, 1000, 2048, 8192, 32768)],
    "widths": [
        (4, 8, 4096, *widths)
        for widths in ((64, 64), (64, 128), (128, 128), (160, 96), (256, 256), (256, 512))
    ],
    "batches": [(B, 8, 4096, 128, 256) for B in (1, 2, 8, 32)],
    "decode": [(B, 8, 256, 512) for B in (1, 8, 64)],  # B, NH, DHQK, DHHV
    "slstm": [(8, 512, 4, 64), (16, 2048, 4, 128), (64, 1024, 8, 256)],  # B, S, NH, DH
    "errors": [(1, 2, 300, 64, 128)],
}
TINY = {
    "headline": [(2, 2, 32, 8, 16)],
    "lengths": [(1, 2, 17, 8, 8)],
    "widths": [],
    "batches": [],
    "decode": [(2, 2, 8, 16)],
    "slstm": [(2, 6, 2, 4)],
    "errors": [(1, 2, 20, 4, 8)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "tables", nargs="*", type=one_of(SHAPES), metavar="TABLE", help=", ".join(SHAPES)
    )
    parser.add_argument("--device", choices=["gpu", "cpu"], required=True)
    parser.add_argument("--tiny", action="store_true", help="small shapes: no figure means a thing")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--turns", type=positive, default=7)
    parser.add_argument("--json")
    options = parser.parse_args()
    if BACKEND not in devices.DEVICES:
        parser.error(f"KERAS_BACKEND must be one of {list(devices.DEVICES)}, not {BACKEND}")
    path = options.json
    if not (path or options.tables or options.tiny):
        path = HERE / "results" / f"{options.device}-{BACKEND}.json"
    bench = Benchmark(options)
    results = devices.provenance(bench.device, BACKEND) | {"unit": "ms, MB"} | bench.limits
    for name, value in results.items():
        print(f"{name}: {value}")
    for table in options.tables or SHAPES:
        results[table] = bench.table(table)
        if path:  # after each table: a GPU may be gone before the last
            Path(path).write_text(json.dumps(results | {"missing": bench.missing}, indent=1) + "\n")
    for name, why in bench.missing.items():
        print(f"peer missing: {name} ({why})")
    return 1 if bench.broken else 0


class Benchmark:
    def __init__(self, options):
        self.options, self.shapes = options, TINY if options.tiny else SHAPES
        self.device = devices.DEVICES[BACKEND](options.device)
        self.limits, self.missing, self.broken = {}, {}, False
        for dtype in options.dtypes:
            self.limits |= self.device.limits(dtype, options.tiny)
        peers.SCRIPT = gpu_peers.__file__

    def table(self, name):
        """One row for each shape and dtype. What breaks is shown, and the others go on."""
        run = getattr(self, name, self.mlstm)
        rows = {}
        for shape in self.shapes[name]:
            for dtype in self.options.dtypes:
                title = f"{name} {shape} {dtype}"
                try:
                    rows[f"{shape} {dtype}"] = run(title, shape, dtype)
                except Exception as e:
                    traceback.print_exc()
                    rows[f"{shape} {dtype}"] = {"broken": f"{type(e).__name__}: {e}"[:300]}
                    self.broken = True
        return rows

    def found_peers(self, table, *args):
        try:
            others, missing = peers.elsewhere(f"gpu {table}", *args)
        except (BrokenPipeError, RuntimeError) as e:
            others, missing = {}, {f"all of {table} {args}": str(e)}
        self.missing |= missing
        return others

    def races(self, title, served, ours, others, work=None, limit=None):
        result = {"served by": served}
        for what, run in ours.items():
            contenders = [Contender("ours", devices.timed(self.device, run), ours=True)] + [
                Contender(name, runs[what], is_peer=not name.startswith(("attention", "simple")))
                for name, runs in others.items()
            ]
            turns = 1 if self.options.tiny else self.options.turns
            result[what] = race(
                f"{title}, {what}: {served}", contenders, turns, work and work[what], limit
            )
        return result

    def mlstm(self, title, shape, dtype):
        inputs, d_h = self.mlstm_inputs(shape, dtype)
        others = self.found_peers("mlstm", shape, dtype, self.options.device)
        result = self.races(
            title,
            served_by("mlstm", *inputs),
            forward_and_gradient(ops.mlstm, inputs, d_h, BACKEND),
            others,
            mlstm_gflop(shape),
            self.limits[f"gemm_gflops_{dtype}"],
        )
        peaks = {"ours": self.device.peak_mb(ops.mlstm, inputs, d_h)}
        for name in others:
            if name in result["forward+backward"]:
                peaks[name] = others[name]["peak MB"]()
        print("  peak:", ", ".join(f"{name} {mb or 0:.0f} MB" for name, mb in peaks.items()))
        return result | {"peak MB": peaks}

    def mlstm_inputs(self, shape, dtype):
        B, NH, S, DHQK, DHHV = shape
        wide = [self.device.normal(B, S, NH, w, dtype=dtype) for w in (DHQK, DHQK, DHHV, DHHV)]
        gates = self.device.normal(B, S, NH), self.device.normal(B, S, NH) + 3
        return [*wide[:3], *gates], wide[3]

    def decode(self, title, shape, dtype):
        """Of as many states in turn as no cache holds: each is read and written once."""
        B, NH, DHQK, DHHV = shape
        size = 4 * B * NH * DHQK * DHHV
        copies = 2 if self.options.tiny else max(2, 2**28 // size)
        inputs, _ = self.mlstm_inputs((B, NH, 1, DHQK, DHHV), dtype)
        normal = self.device.normal
        states = [
            (normal(B, NH, DHQK, DHHV), normal(B, NH, DHQK), normal(B, NH)) for _ in range(copies)
        ]

        def step(state):
            return ops.mlstm(*inputs, initial_state=state, return_state=True)

        served = served_by("mlstm", *inputs, initial_state=states[0])
        runs = self.device.steps(step, states)
        others = self.found_peers("decode", shape, dtype, self.options.device, copies)
        contenders = [
            Contender(f"ours{how}", devices.timed(self.device, run, steps=copies), ours=True)
            for how, run in runs.items()
        ] + [Contender(name, other["step"]) for name, other in others.items()]
        turns = 1 if self.options.tiny else self.options.turns
        rows = race(f"{title}: {served}", contenders, turns)
        for name, row in rows.items():
            if name in {c.name for c in contenders}:
                row["of_copy"] = 2 * size / row["median"] / 1e6 / self.limits["copy_gb_per_s"]
                print(f"  {name:34}{row['of_copy']:9.2f} of the copy bandwidth")
        return {"served by": served, "step": rows}

    def slstm(self, title, shape, dtype):
        B, S, NH, DH = shape
        normal = self.device.normal
        inputs = [
            normal(B, S, 4, NH, DH, dtype=dtype),
            0.1 * normal(NH, DH, 4, DH),
            normal(4, NH, DH),
        ]
        ours = forward_and_gradient(ops.slstm, inputs, normal(B, S, NH, DH, dtype=dtype), BACKEND)
        others = self.found_peers("slstm", shape, self.options.device)
        return self.races(title, served_by("slstm", *inputs), ours, others)

    def errors(self, title, shape, dtype):
        """Of h, and of derivatives along a direction of each input, beside float64.

        Relative to the largest h and to the largest derivative, of inputs as they are after
        rounding; next to those of the plain forms in this dtype, of which one is the definition.
        """
        inputs, d_h = self.mlstm_inputs(shape, dtype)
        exact, weight = [as_float64(x) for x in inputs], as_float64(d_h)
        rng = np.random.default_rng(0)
        directions = [rng.normal(size=(8, *x.shape)) for x in exact]
        truth = {"h": oracle.mlstm(*exact)[0]}

        def loss(*x):
            return np.sum(oracle.mlstm(*x)[0] * weight)

        for number, name in enumerate("qkvif"):
            still = [np.zeros_like(x) for x in exact]
            truth[f"d{name}"] = [
                oracle.directional(loss, exact, [*still[:number], move, *still[number + 1 :]])
                for move in directions[number]
            ]
        result = {}
        for kernel in ("auto", "chunkwise", "recurrent"):
            h, gradients = outputs_and_gradients(
                lambda *x, kernel=kernel: ops.mlstm(*x, kernel=kernel), inputs, d_h
            )
            got = {"h": as_float64(h)}
            for name, gradient, moves in zip("qkvif", gradients, directions, strict=True):
                got[f"d{name}"] = [np.sum(as_float64(gradient) * move) for move in moves]
            result[served_by("mlstm", *inputs, kernel=kernel).split(",")[0]] = {
                name: float(np.max(np.abs(np.subtract(got[name], x))) / np.max(np.abs(x)))
                for name, x in truth.items()
            }
        print(f"\n{title}")
        for kernel, errors in result.items():
            print(f"  {kernel:12}", *(f"{name} {x:.1e}" for name, x in errors.items()))
        return result


def served_by(op, *args, **kwargs):
    """The kernel, its form and sizes."""
    lines = kernels.explain(*args, op=op, **kwargs).splitlines()
    line = next(line.removeprefix("* ") for line in lines if line.startswith("*"))
    return line.replace(": serves this call", "")


def as_float64(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).astype("float64")


def outputs_and_gradients(function, inputs, d_output):
    if BACKEND == "jax":
        import jax

        output, pull = jax.vjp(function, *inputs)
        return output, pull(d_output)
    import torch

    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, d_output)


if __name__ == "__main__":
    sys.exit(main())
