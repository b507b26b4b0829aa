"""`predict_memory`: weights and states to the byte, steps as compiled programs hold them."""

import math
import os
import subprocess
import sys
from pathlib import Path

import keras
import psutil
import pytest

from keras_xlstm.models import XLSTMBackbone, predict_memory

BACKEND = keras.backend.backend()
ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(vocabulary_size=48, num_layers=2, hidden_dim=32, num_heads=4)
CONFIGS = {
    "large": SIZES,
    "large, bfloat16": SIZES | dict(dtype="bfloat16", tie_embeddings=True),
    "large, sLSTM": SIZES | dict(slstm_at=[1], qk_dim_factor=1.0),
    "original": SIZES | dict(block_style="original", slstm_at=[0], dtype="mixed_float16"),
}


def nbytes(variables):
    return sum(math.prod(v.shape) * {"16": 2, "32": 4, "64": 8}[v.dtype[-2:]] for v in variables)


@pytest.mark.parametrize(
    "name, optimizer", [(name, "adamw") for name in CONFIGS] + [("large", "lion"), ("large", "sgd")]
)
def test_weights_slots_and_states_are_those_of_a_built_model(name, optimizer):
    backbone = XLSTMBackbone(**CONFIGS[name])
    weights, built = backbone.trainable_variables, keras.optimizers.get(optimizer)
    built.build(weights)
    states = [x for block in backbone.stack.get_initial_state(6) for x in block]
    for config in (CONFIGS[name], backbone):
        memory = predict_memory(config, 6, 10, optimizer=optimizer)
        assert memory.parameters == memory.gradients == nbytes(weights)
        assert memory.optimizer == nbytes(built.variables)
        assert memory.states == sum(4 * math.prod(x.shape) for x in states)
    assert backbone.trainable_variables == weights  # untouched


def test_the_optimizer_that_is_passed_is_not_built():
    optimizer = keras.optimizers.SGD(momentum=0.9)
    memory = predict_memory(SIZES, 1, 1, optimizer=optimizer)
    assert memory.optimizer > memory.parameters and not optimizer.built


def test_what_cannot_be_told():
    """Found while the model is built of shapes, so that `bad_input.txt` has no row of it."""
    message = "2 devices for axis 0 of `token_embedding/embeddings` of 49"
    with pytest.raises(ValueError, match=f"`mesh` must divide what it splits. Received: {message}"):
        predict_memory(SIZES | dict(vocabulary_size=49), 1, 1, mesh={"model": 2})
    with pytest.raises(ValueError, match="`optimizer` must be one that .* Received: Adafactor."):
        predict_memory(SIZES, 1, 1, optimizer="adafactor")


def test_what_is_not_there_is_not_allocated():
    """The 7B, in less memory than any weight of it takes."""
    before = psutil.Process().memory_info().rss
    large = dict(vocabulary_size=50304, num_layers=32, hidden_dim=4096, num_heads=8)
    memory = predict_memory(large, 8, 2048, remat=True)
    assert memory.parameters == 4 * 6_865_424_896
    assert memory.total > 3 * memory.parameters
    with keras.StatelessScope():
        pass  # at its end Keras initializes what waits for that
    assert psutil.Process().memory_info().rss - before < 2e9


def test_computing_again_and_meshes_make_it_less():
    plain = predict_memory(SIZES, 8, 128)
    again = predict_memory(SIZES, 8, 128, remat=True)
    assert again.activations < plain.activations and again.total < plain.total
    assert again.parameters == plain.parameters
    rows = predict_memory(SIZES, 8, 128, mesh={"batch": 4})
    assert rows == predict_memory(SIZES, 2, 128)
    heads = predict_memory(SIZES, 8, 128, mesh={"model": 4})
    assert plain.activations / 4 < heads.activations < plain.activations
    assert heads.states == plain.states / 4


@pytest.mark.skipif(BACKEND != "jax", reason="Keras 3.15 distributes on JAX only")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_device_holds_its_part(name):
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layout_map = XLSTMBackbone.get_layout_map(mesh)
    with keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch").scope():
        variables = XLSTMBackbone(**CONFIGS[name]).trainable_variables
        optimizer = keras.optimizers.AdamW()
        optimizer.build(variables)
    memory = predict_memory(CONFIGS[name], 8, 10, mesh={"batch": 2, "model": 4})
    held = [
        sum(v.value.addressable_shards[0].data.nbytes for v in which)
        for which in (variables, optimizer.variables)
    ]
    assert [memory.parameters, memory.optimizer] == held
    assert memory.parameters < predict_memory(CONFIGS[name], 8, 10).parameters


@pytest.mark.skipif(BACKEND == "tensorflow", reason="does not say what a step takes")
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.long_on_xla)])
def test_a_step_takes_what_the_framework_reports(remat):
    """In a process of its own, for which XLA optimizes, and orders by memory."""
    code = (
        "import sys; sys.modules['triton'] = None; "  # as in `conftest.py`
        "import memory_table as table; c = table.SMALL | dict(num_layers=2); "
        f"told = table.predict_memory(c, 2, 2048, remat={remat}); "
        f"print(told.total, table.measured(c, 2, 2048, remat={remat}))"
    )
    paths = [str(ROOT / "examples"), str(ROOT), str(ROOT / "backends"), *sys.path]
    env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, reported = map(int, done.stdout.split())
    assert abs(told / reported - 1) < 0.1
