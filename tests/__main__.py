"""Lint, types, and all tests once per backend, and those of Triton's kernels, interpreted.

python -m tests                                 everything
python -m tests jax torch -k conv --maxfail=1   some backends, and arguments for pytest
python -m tests jax -m long                     what takes long, and is left out otherwise
"""

import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("jax", "tensorflow", "torch")
# In a process of their own: the kernels of Triton on the CPU, see `test_triton.py`.
TRITON = ("tests/test_triton.py", "tests/test_mlstm.py", "tests/test_slstm.py")
TRITON += ("tests/test_transforms.py", "-k", "triton or (transforms and (mlstm or slstm))")
CHECKS = ("ruff check", "ruff format --check", "mypy")
# TensorFlow tells of the machine's CPU, at length. JAX would look for a TPU where libtpu is, which
# is there to compile for TPUs; GPUs have `pytest -m gpu`.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}

# XLA's compilation would take most of the time. Tests marked `compiled` have it as users do; in the
# others it skips what makes programs fast, and JAX shares them between the workers.
FAST = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def main(arguments):
    """Runs everything, also after a failure. Returns whether all went well."""
    chosen = tuple(takewhile(BACKENDS.__contains__, arguments))
    arguments, backends = arguments[len(chosen) :], chosen or BACKENDS
    start = time.monotonic()
    broken = [check for check in CHECKS if run(check.split())]
    results = {backend: run_pytest(backend, arguments) for backend in backends}
    if "torch" in backends and not arguments and find_spec("triton"):
        results["triton"] = run_pytest("torch", TRITON, TRITON_INTERPRET="1")

    print("\nbackend     passed  failed  errors  skipped  seconds")
    for backend, result in results.items():
        counts, seconds = result["counts"], result["seconds"]
        print("{:10}{passed:8}{failed:8}{errors:8}{skipped:9}".format(backend, **counts), end="")
        print(f"{seconds:9.0f}{'' if result['good'] else '  <- not good'}")
    print(f"lint and types: {', '.join(broken) + ' failed' if broken else 'good'}")
    total = {key: sum(r["counts"][key] for r in results.values()) for key in NO_COUNTS}
    summary = ", ".join(f"{n} {key}" for key, n in total.items() if n or key == "passed")
    print(f"===== {summary} in {time.monotonic() - start:.2f}s =====")
    return not broken and all(result["good"] for result in results.values())


NO_COUNTS = dict.fromkeys(("failed", "passed", "skipped", "errors"), 0)


def run_pytest(backend, arguments, **settings):
    start, counts, exit_codes = time.monotonic(), dict(NO_COUNTS), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.xml")
        fast = FAST | {"JAX_COMPILATION_CACHE_DIR": folder}
        rest = ["-m", "not (compiled or gpu or long)"]
        parts = [(["-m", "compiled"], {}), (rest, fast)]
        if backend == "torch":  # XLA is in the other backends that its tests start
            parts = [([], fast)]
        elif "-m" in arguments:
            parts = [([], {})]
        # Two workers of one thread each: torch is slow where threads outnumber cores.
        settings |= {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
        for marked, environment in parts:
            command = ["pytest", "-n2", "--dist=worksteal", f"--junitxml={path}", *marked]
            exit_codes.append(run([*command, *arguments], **settings | environment))
            for suite in ElementTree.parse(path).iter("testsuite") if path.exists() else ():
                found = {name: int(suite.get(name)) for name in ("failures", "errors", "skipped")}
                counts["passed"] += int(suite.get("tests")) - sum(found.values())
                counts["failed"] += found["failures"]
                counts["errors"] += found["errors"]
                counts["skipped"] += found["skipped"]
            path.unlink(missing_ok=True)
    # Of one part the arguments may have chosen nothing, which pytest calls 5.
    good = set(exit_codes) <= {0, 5} and counts["passed"] > 0
    return {"good": good, "counts": counts, "seconds": time.monotonic() - start}


def run(command, **environment):
    print("\n$", *(f"{name}={value}" for name, value in environment.items()), *command, flush=True)
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, cwd=ROOT, env=os.environ | QUIET | environment).returncode


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
