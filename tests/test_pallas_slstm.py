"""The Pallas sLSTM without a GPU and without a TPU: interpreted, and in the real compilers.

`KERAS_XLSTM_PALLAS` says what a call is computed as, see `keras_xlstm_pallas/target.py`.
"""

from dataclasses import replace

import conformance
import keras
import numpy as np
import pytest
from conformance import BOTH, SLSTM_CASES, Case, slstm_inputs

from keras_xlstm import kernels
from keras_xlstm.ops import slstm

if keras.backend.backend() != "jax":
    pytest.skip("Pallas serves JAX", allow_module_level=True)
import jax
import jax.numpy as jnp
from keras_xlstm_pallas import slstm_gpu, slstm_tpu
from keras_xlstm_pallas.target import SETTING

PLATFORMS = "gpu", "tpu"
on_each = pytest.mark.parametrize("platform", PLATFORMS)

WIDE = Case(S=9, mask="holes", reset="some", NH=2, DHHV=20)  # no full piece on a GPU
GPU = {name: case for name, case in SLSTM_CASES.items() if name != "no-step"} | {
    "columns": replace(WIDE, dtype="bfloat16"),
    "full-tile": replace(WIDE, B=16, DHHV=16),
    "tiles": replace(WIDE, B=17, DHHV=3),
}
# All alike share a compilation. The interpreter of TPUs takes its time for each step.
ALL_ALIKE = (
    "plain mask-left mask-all reset-some mask-and-reset i-high-f-low i-f-mixed-mask-and-reset"
)
TPU = {name: replace(SLSTM_CASES[name], S=20, NH=2) for name in ALL_ALIKE.split()} | {
    "bfloat16": replace(BOTH, S=20, dtype="bfloat16", jit=False),
    "float16": replace(BOTH, S=20, dtype="float16", jit=False),
    "one-step-reset": SLSTM_CASES["one-step-reset"],
    "mask-all-fresh": SLSTM_CASES["mask-all-fresh"],
    "narrow": SLSTM_CASES["two-steps-narrow"],
    "blocks": replace(BOTH, S=19, NH=2, jit=False),
    "tiles": replace(BOTH, S=5, B=9, NH=1, jit=False),
}


@pytest.mark.parametrize("name", GPU)
def test_as_on_a_gpu(interpreted, name):
    conformance.check_all("slstm", interpreted("slstm", "gpu"), GPU[name])


def test_rows_of_a_tile_are_there():
    """The interpreter would not mind, and a GPU would write into other arrays."""
    rows = [slstm_gpu.rows_of_tile(number, 17).tolist() for number in range(2)]
    assert rows == [list(range(16)), [16] * 16]


@pytest.mark.parametrize("name", TPU)
def test_as_on_a_tpu(interpreted, monkeypatch, name):
    if name == "blocks":  # of 4 steps, the last one of 3
        monkeypatch.setattr(slstm_tpu, "VMEM", 4 * 2 * 17 * 8 * 128 * 4)
    if name == "tiles":
        monkeypatch.setattr(slstm_tpu, "rows_of", lambda B: 8)
    conformance.check_all("slstm", interpreted("slstm", "tpu"), TPU[name])


def arguments(case):
    """For the op, recurrent dropout and fresh elements among running ones included."""
    inputs, state = slstm_inputs(case)
    rng = np.random.default_rng(0)
    fresh = rng.random(state["n"].shape) < 0.5
    state = {name: np.where(fresh, 0, x) for name, x in state.items()}
    inputs["gates"][:, 0, 0] = -60  # far below m = 0: a fresh element must take it all the same
    scale = rng.choice([0.0, 2.0], size=fresh.shape)
    return [jnp.array(x, "float32") for x in (*inputs.values(), *state.values(), scale)]


def outputs(kernel, case, tensors):
    gates, R, bias, *state, scale = tensors
    h, state = slstm(
        gates,
        R,
        bias,
        initial_state=state,
        recurrent_scale=scale,
        return_state=True,
        kernel=kernel,
        **case.flags(),
    )
    return h, *state


def gradients(kernel, case, tensors):
    def loss(tensors):
        return sum(jnp.sum(jnp.sin(y + k)) for k, y in enumerate(outputs(kernel, case, tensors)))

    return jax.grad(loss)(tensors)


@on_each
def test_recurrent_scale_and_fresh_elements(interpreted, platform):
    """As XLA's form, which the suite holds to the oracle."""
    case = Case(S=7, mask="holes", reset="some")
    tensors, kernel = arguments(case), interpreted("slstm", platform)
    for function in outputs, gradients:
        pairs = zip(*(function(k, case, tensors) for k in (kernel, "xla")), strict=True)
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@on_each
def test_rows_mapped_and_second_derivatives(interpreted, platform):
    case = Case(S=3, NH=1, DHHV=3, mask="holes", reset="some")
    tensors, kernel = arguments(case), interpreted("slstm", platform)
    shared = 1, 2  # the recurrent kernel and the bias
    axes = [None if number in shared else 0 for number in range(len(tensors))]

    def one(kernel, tensors):
        """Of one row: the gradient of the slope of the loss along all ones."""
        tensors = [x if n in shared else x[None] for n, x in enumerate(tensors)]

        def slope(tensors):
            return sum(map(jnp.sum, gradients(kernel, replace(case, B=1), tensors)))

        return jax.grad(slope)(tensors)

    ours, theirs = (
        jax.vmap(lambda *tensors, k=k: one(k, tensors), axes)(*tensors) for k in (kernel, "xla")
    )
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_why_not_and_how(monkeypatch):
    def explain(DH, setting=None):
        if setting:
            monkeypatch.setenv(SETTING, setting)
        gates, R = jnp.ones((1, 2, 4, 1, DH)), jnp.ones((1, DH, 4, DH))
        return kernels.explain(gates, R, jnp.ones((4, 1, DH)), op="slstm")

    assert "pallas: needs a GPU or a TPU, the default device is a CPU" in explain(4)
    assert "* pallas: serves this call, for a GPU, interpreted, by 16 rows" in explain(
        4, "interpret-gpu"
    )
    assert "* pallas: serves this call, for a TPU, by 8 rows a program" in explain(512, "tpu")
    assert "pallas: needs heads of at most 512 on a TPU, " in explain(513)
    assert "pallas: needs heads of at most 64 on a GPU, " in explain(65, "gpu")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs a GPU or a TPU")
@pytest.mark.parametrize("name", GPU)
def test_on_a_device(name):
    conformance.check_all("slstm", "pallas", GPU[name])
