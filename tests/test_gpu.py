"""What serves on a GPU, whichever backend: `pytest -m gpu` where there is one.

Keras creates tensors on the GPU where there is one, so that the tests need not ask for it.
"""

import dataclasses

import conformance
import keras
import numpy as np
import pytest
from conformance import OPS

from keras_xlstm import kernels
from keras_xlstm.layers import MLSTM, SLSTM

BACKEND = keras.backend.backend()


def has_gpu():
    if BACKEND == "torch":
        import torch

        return torch.cuda.is_available()
    if BACKEND == "jax":
        import jax

        return jax.default_backend() == "gpu"
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


HERE = "GPU" if has_gpu() else "CPU"
needs_gpu = pytest.mark.skipif(HERE != "GPU", reason="needs a GPU")
FASTEST = {
    "CPU": {"torch": "torch", "jax": "xla", "tensorflow": "xla"},
    "GPU": {"torch": "triton", "jax": "pallas", "tensorflow": "xla"},
}


def names(op):
    return [pytest.param(op, name, id=f"{op}-{name}") for name in OPS[op].cases]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("op, name", names("mlstm") + names("slstm"))
def test_conformance_of_what_serves_on_a_gpu(op, name):
    case = OPS[op].cases[name]
    conformance.check_all(op, "auto", case)


def served_in_fit(monkeypatch):
    """The kernels that serve a model of both layers while it is trained, by operation."""
    kernels.available()  # loads the entry points
    served = {"mlstm": set(), "slstm": set()}

    def spy(op, kernel):
        def run(*args, **kwargs):
            served[op].add(kernel.name)
            return kernel.run(*args, **kwargs)

        return dataclasses.replace(kernel, run=run)

    for op in served:
        spies = {name: spy(op, kernel) for name, kernel in kernels._kernels[op].items()}
        monkeypatch.setitem(kernels._kernels, op, spies)
    layers = MLSTM(32, num_heads=2, return_sequences=True), SLSTM(32, num_heads=2)
    model = keras.Sequential([*layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    x = np.random.default_rng(0).normal(size=(8, 20, 4)).astype("float32")
    history = model.fit(x, x.mean((1, 2)), epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]
    return served


@pytest.mark.skipif(HERE != "CPU", reason="of a machine without a GPU")
def test_fit_takes_the_fastest_kernel_of_a_cpu(monkeypatch):
    name = FASTEST["CPU"][BACKEND]
    assert served_in_fit(monkeypatch) == {"mlstm": {name}, "slstm": {name}}


@pytest.mark.gpu
@needs_gpu
def test_fit_takes_the_fastest_kernel_of_a_gpu(monkeypatch):
    """The same model: users need change nothing."""
    name = FASTEST["GPU"][BACKEND]
    assert served_in_fit(monkeypatch) == {"mlstm": {name}, "slstm": {name}}
