"""A GPU, or a CPU in its place: tensors on it, its clock, its memory, and what it can do."""

import datetime
import functools
import subprocess
from importlib import metadata

from measure import Elsewhere, seconds

ENOUGH = 0.02  # seconds of a turn, where one run takes less: launches then overlap with work


class Torch:
    def __init__(self, kind):
        import torch

        self.torch, self.name = torch, "cuda" if kind == "gpu" else "cpu"
        if kind == "gpu" and not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
        self.chip = torch.cuda.get_device_name() if kind == "gpu" else "a CPU"
        self.random = torch.Generator(self.name).manual_seed(0)

    def normal(self, *shape, dtype="float32"):
        options = {"device": self.name, "dtype": getattr(self.torch, dtype)}
        return self.torch.randn(shape, generator=self.random, **options)

    def seconds(self, run, repeats=1):
        """Of each of several runs in a row: by CUDA events, on a CPU by the plain clock."""
        if self.name == "cpu":
            return seconds(lambda: [run() for _ in range(repeats)]) / repeats
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    def peak_mb(self, function, inputs, d_output):
        """What forward+backward takes at most, beside its inputs."""
        if self.name == "cpu":
            return None
        cuda = self.torch.cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        self.torch.autograd.grad(function(*inputs), inputs, d_output)
        return (cuda.max_memory_allocated() - before) / 1e6

    def steps(self, step, states):
        """Runs of `step`, state -> (h, state), on each of several states, by name.

        A launch from Python takes longer than a small step: a CUDA graph has all of them at once.
        """
        torch = self.torch

        def run():
            with torch.no_grad():
                for number, state in enumerate(states):
                    _, states[number] = step(state)

        if self.name == "cpu":
            return {"": run}
        run()  # compiles what there is to compile
        torch.cuda.synchronize()
        graph, first = torch.cuda.CUDAGraph(), list(states)
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as e:  # such as for a copy from the host
            print(f"no CUDA graph of these steps: {e}"[:200])
            return {"": run}
        finally:
            states[:] = first  # where the graph reads them
        return {"": graph.replay, ", no CUDA graph": run}

    def limits(self, dtype, tiny=False):
        n = 64 if tiny else 8192
        x, y = (self.normal(n, n, dtype=dtype) for _ in range(2))
        a, b = (self.normal(2**10 if tiny else 2**28) for _ in range(2))
        return self._limits(dtype, n, lambda: self.torch.mm(x, y), a.nbytes, lambda: b.copy_(a))

    def _limits(self, dtype, n, product, size, copy):
        """Of the fastest of several turns: a limit is what is possible."""
        product, copy = (timed(self, run) for run in (product, copy))
        product_s, copy_s = (min(run() for _ in range(9)) for run in (product, copy))
        return {
            f"gemm_gflops_{dtype}": 2 * n**3 / product_s / 1e9,
            "copy_gb_per_s": 2 * size / copy_s / 1e9,
        }


class Jax(Torch):
    def __init__(self, kind):
        import jax

        self.jax, self.name = jax, kind
        if kind == "gpu" and jax.default_backend() != "gpu":
            raise RuntimeError(f"JAX finds no GPU, but {jax.devices()}")
        self.chip = jax.devices()[0].device_kind
        self.key = jax.random.key(0)

    def normal(self, *shape, dtype="float32"):
        self.key, key = self.jax.random.split(self.key)
        return self.jax.random.normal(key, shape, dtype)

    def seconds(self, run, repeats=1):
        """Until the last result is there; each run waits for its own."""
        return seconds(lambda: [run() for _ in range(repeats)]) / repeats

    def peak_mb(self, function, inputs, d_output):
        """As the compiler says."""
        gradient = self.jax.jit(
            lambda d_output, *inputs: self.jax.vjp(function, *inputs)[1](d_output)
        )
        sizes = gradient.lower(d_output, *inputs).compile().memory_analysis()
        return (sizes.temp_size_in_bytes + sizes.output_size_in_bytes) / 1e6

    def steps(self, step, states):
        """One loop that is compiled, as generation is one."""
        jax = self.jax

        @functools.partial(jax.jit, donate_argnums=0)
        def loop(states):
            return tuple(zip(*map(step, states), strict=True))  # every h, and every state

        def run():
            _, states[:] = jax.block_until_ready(loop(states))

        return {"": run}

    def limits(self, dtype, tiny=False):
        jax, n = self.jax, 64 if tiny else 8192
        x, y = (self.normal(n, n, dtype=dtype) for _ in range(2))
        a = self.normal(2**10 if tiny else 2**28)
        precision = "highest" if dtype == "float32" else None
        product = jax.jit(functools.partial(jax.numpy.matmul, precision=precision))
        copy = jax.jit(lambda a: a + 1)

        def run(function, *args):
            return lambda: jax.block_until_ready(function(*args))

        return self._limits(dtype, n, run(product, x, y), a.nbytes, run(copy, a))


DEVICES = {"torch": Torch, "jax": Jax}


def timed(device, run, steps=1):
    """A run for `measure.race`, of `steps` steps. It goes by the device's clock, for each step."""
    repeats = 1

    def once():
        nonlocal repeats
        taken = device.seconds(run, repeats)
        repeats = max(1, min(20, int(ENOUGH / taken)))
        return Elsewhere(taken / steps)

    return once


def provenance(device, backend):
    """What figures are of."""
    versions = {
        name: _version(name) for name in ("keras", "torch", "triton", "jax", "mlstm_kernels")
    }
    return {
        "backend": backend,
        "chip": device.chip,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "date": datetime.date.today().isoformat(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command):
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.splitlines()[0].strip()
