"""The benchmark for GPUs, on a CPU at a tiny size: nobody with a GPU should find it broken."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("once is enough", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
DTYPES = "bfloat16", "float32"


def test_every_table(tmp_path):
    path = tmp_path / "results.json"
    options = ["--device", "cpu", "--tiny", "--dtypes", *DTYPES, "--json", str(path)]
    command = [sys.executable, "examples/benchmarks/kernels.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(path.read_text())
    assert results["backend"] == "torch" and {"commit", "chip", "date", "versions"} <= set(results)

    row = results["headline"]["(2, 2, 32, 8, 16) bfloat16"]
    assert row["served by"].startswith("torch, in chunks of")
    for what in ("forward", "forward+backward"):
        ours, attention = row[what]["ours"], row[what]["attention, 2 heads of 16"]
        assert 0 < ours["min"] <= ours["median"] <= ours["max"] and attention["median"] > 0
        rate = results["gemm_gflops_bfloat16"]
        assert ours["of_gemm"] == pytest.approx(ours["gflops"] / rate)
    (decode,) = (x for name, x in results["decode"].items() if name.endswith("float32"))
    moved = 2 * 4 * 2 * 2 * 8 * 16 / decode["step"]["ours"]["median"] / 1e6  # GB/s
    assert decode["step"]["ours"]["of_copy"] == pytest.approx(moved / results["copy_gb_per_s"])
    assert len(results["slstm"]) == len(results["errors"]) == len(DTYPES)
    for name, kernels in results["errors"].items():
        allowed = 2e-2 if name.endswith("bfloat16") else 1e-5
        assert list(kernels) == ["torch", "chunkwise", "recurrent"]
        errors = {(kernel, of): x for kernel, row in kernels.items() for of, x in row.items()}
        assert not {where: x for where, x in errors.items() if not x < allowed}, name
    for module, peer in {"mlstm_kernels": "mlstm_kernels", "fla": "simple_gla"}.items():
        assert (peer in results["missing"]) == (find_spec(module) is None)
