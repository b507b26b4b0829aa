"""The Pallas mLSTM without a GPU and without a TPU: interpreted, and in the real compilers.

`KERAS_XLSTM_PALLAS` says what a call is computed as, see `keras_xlstm_pallas/target.py`.
"""

import functools
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import conformance
import keras
import numpy as np
import pytest
from conformance import MLSTM_CASES, Case

from keras_xlstm import kernels
from keras_xlstm.ops import mlstm

if keras.backend.backend() != "jax":
    pytest.skip("Pallas serves JAX", allow_module_level=True)
import jax
import jax.numpy as jnp
from keras_xlstm_pallas import mlstm as pallas
from keras_xlstm_pallas.target import SETTING

ROOT = Path(__file__).resolve().parents[1]

# Two whole chunks and a part of one, and several tiles of values.
WIDE = dict(S=37, NH=2, mask="holes", reset="some", chunk_size=16)
GPU = {name: case for name, case in MLSTM_CASES.items() if name != "no-step"} | {
    "tiles": Case(DHQK=20, DHHV=40, **WIDE),
    "tiles-bfloat16": Case(DHQK=130, DHHV=70, dtype="bfloat16", **WIDE),
}
# Its interpreter is slow.
SOME = "mask-holes", "mask-all", "reset-some", "i-low-f-high", "i-f-mixed-mask-and-reset"
SOME += "bfloat16", "one-step-reset", "chunk-of-100"
TPU = {name: MLSTM_CASES[name] for name in SOME} | {
    "tiles": Case(DHQK=20, DHHV=200, **WIDE),  # filled up to two tiles of 128
    "tiles-bfloat16": Case(DHQK=128, DHHV=256, dtype="bfloat16", **WIDE),  # cut out by lanes
}


@pytest.mark.parametrize("name", GPU)
def test_as_on_a_gpu(interpreted, name):
    conformance.check_all("mlstm", interpreted("mlstm", "gpu"), GPU[name])


@pytest.mark.parametrize("name", TPU)
def test_as_on_a_tpu(interpreted, monkeypatch, name):
    if name.startswith("tiles"):
        monkeypatch.setattr(pallas, "MEMORY", 128 * TPU[name].DHQK)
    conformance.check_all("mlstm", interpreted("mlstm", "tpu"), TPU[name])


def given(case):
    """The arguments of `outputs`, and weights of them."""
    expected = conformance.truth("mlstm", case)
    return list(expected.tensors.values()), [jnp.asarray(w) for w in expected.weights]


def outputs(kernel, tensors):
    options = {"kernel": kernel, "return_state": True, "chunk_size": 16}
    h, state = conformance.call("mlstm", mlstm, tensors, {}, **options)
    return [h, *state]


def test_vmap_and_second_derivatives(interpreted):
    """Both as of XLA's form, which `test_transforms.py` holds to the oracle."""
    kernel, (tensors, weights) = interpreted("mlstm", "gpu"), given(Case(S=20))

    def slopes(kernel, tensors):
        def loss(tensors):
            pairs = zip(weights, outputs(kernel, tensors), strict=True)
            return sum(jnp.sum(w * y) for w, y in pairs)

        return jax.grad(loss)(tensors)

    def steepness(tensors, kernel):
        return sum(jnp.sum(x**2) for x in slopes(kernel, tensors))

    def of_row(tensors, kernel):
        return slopes(kernel, [x[None] for x in tensors])

    def of_rows(tensors, kernel):
        return jax.vmap(lambda *row: of_row(row, kernel))(*tensors)

    for derivatives in jax.grad(steepness), of_rows:
        ours, theirs = (jax.jit(derivatives, static_argnums=1)(tensors, x) for x in (kernel, "xla"))
        for x, y in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * np.max(np.abs(y)))


def run(script, **environment):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    command = [sys.executable, *script.split()]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "arguments",
    [
        "v5e --dtypes bfloat16 --widths 128x256 20x36 128 --of gradients",
        "v5p --dtypes bfloat16 --widths 128x128 128",
        "v6e --dtypes float32 --widths 64x64 20 --of gradients",
    ],
)
def test_compiles_for_tpus(arguments):
    """By the real compiler, in the VMEM that there is, and for chips that share out the work."""
    command = f"examples/benchmarks/pallas.py --steps 300 --compile {arguments}"
    assert "needs" not in run(command)


# `conftest.py` hides Triton from JAX's tests.
@pytest.mark.skipif(PathFinder.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    "arguments",
    [
        "sm_90 --dtypes bfloat16 --widths 128x256 64",
        "sm_90 --dtypes float16 float32 --widths 64x64 64",
        "sm_100 --dtypes bfloat16 --widths 64x64 64",
    ],
)
def test_compiles_for_gpus(arguments):
    """By Triton: no spills, and no more shared memory than there is. The sLSTM too."""
    command = f"examples/benchmarks/pallas.py --steps 100 --of gradients --compile {arguments}"
    assert "needs" not in run(command)


def test_explain_says_for_what_and_how(monkeypatch):
    q = jnp.zeros((1, 300, 2, 64), "bfloat16")
    i = jnp.zeros((1, 300, 2))
    explain = functools.partial(kernels.explain, q, q, q, i, i)
    monkeypatch.delenv(SETTING, raising=False)
    if jax.default_backend() == "cpu":
        assert "- pallas: needs a GPU or a TPU, the default device is a CPU\n* xla" in explain()
    monkeypatch.setenv(SETTING, "tpu")
    assert (
        "* pallas: serves this call, for a TPU, in chunks of 128 steps, by 64 values a program"
    ) in explain()
    wide = jnp.zeros((1, 300, 2, 1030))
    assert "needs keys of at most 1024 on a tpu, received 1030" in kernels.explain(
        wide, wide, q, i, i
    )
    half = q.astype("float16")
    assert "needs one of ('float32', 'bfloat16') on a tpu" in kernels.explain(
        half, half, half, i, i
    )
    monkeypatch.setenv(SETTING, "gpu")
    assert "for a GPU, in chunks of 64 steps, by 64 values a program" in explain()
    monkeypatch.setenv(SETTING, "cuda")
    with pytest.raises(ValueError, match="must be one of"):
        explain()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs a GPU or a TPU")
@pytest.mark.parametrize("name", GPU)
def test_on_a_device(name):
    case = GPU[name]
    if "pallas" in conformance.serving("mlstm", case):  # a TPU has no float16
        conformance.check_all("mlstm", "pallas", case)
