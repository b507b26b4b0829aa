"""All checks: `python -m tests [backend ...] [pytest arguments]`.

Lint, format and types, then the whole suite once under each Keras backend, each in a process of
its own. Exits with 0 only if all of it passed and every backend ran its tests.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
BACKENDS = ("jax", "tensorflow", "torch")
CHECKS = (["ruff", "check"], ["ruff", "format", "--check"], ["mypy"])


def run(command, **env):
    """Runs `python -m command`, shows what it prints, and returns exit code, output, seconds."""
    print(f"\n== {' '.join(f'{k}={v}' for k, v in env.items())} {' '.join(command)}", flush=True)
    start, output = time.perf_counter(), []
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line)
    return process.wait(), "".join(output), time.perf_counter() - start


def main(arguments):
    chosen = [name for name in BACKENDS if name in arguments] or BACKENDS
    arguments = [argument for argument in arguments if argument not in BACKENDS]
    failed = [check for check in CHECKS if run(check)[0]]
    rows, totals = [], {"passed": 0, "failed": 0, "skipped": 0}
    for backend in chosen:
        code, output, seconds = run(["pytest", *arguments], KERAS_BACKEND=backend)
        counts = {
            word: sum(int(n) for n in re.findall(rf"\b(\d+) {word}", output.splitlines()[-1]))
            for word in totals
        }
        counts["failed"] += sum(int(n) for n in re.findall(r"(\d+) error", output[-200:]))
        totals = {word: totals[word] + counts[word] for word in totals}
        if code or not counts["passed"]:
            failed.append(backend)
        rows.append(f"{backend:12}{counts['passed']:8}{counts['failed']:8}{seconds:9.0f}")
    print(f"\n{'backend':12}{'passed':>8}{'failed':>8}{'seconds':>9}", *rows, sep="\n")
    if failed:
        print("FAILED:", *failed)
    print("{passed} passed, {failed} failed, {skipped} skipped".format(**totals))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
