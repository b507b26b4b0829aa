"""Models on a mesh of eight devices, which `conftest.py` asks of JAX on a CPU."""

import functools
import re

import keras
import numpy as np
import pytest

from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

if keras.backend.backend() != "jax":
    pytest.skip("Keras 3.15 distributes on JAX only", allow_module_level=True)
import jax

STYLES = {
    "large": {},
    "large_slstm": dict(slstm_at=(0,)),
    "original": dict(block_style="original"),
    "original_slstm": dict(block_style="original", slstm_at=(0,)),
}
COLLECTIVE = "(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"


def new_backbone(**options):
    return XLSTMBackbone(256, num_layers=1, hidden_dim=64, num_heads=4, **options)


def mesh():
    return keras.distribution.DeviceMesh((2, 4), ("batch", "model"))


def data_parallel():
    return keras.distribution.DataParallel()


def model_parallel():
    layout_map = XLSTMBackbone.get_layout_map(mesh())
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


@functools.cache
def train(distribution, style, steps=20):
    """The losses of some steps, and the text of the program that took them."""
    keras.distribution.set_distribution(distribution and distribution())
    try:
        keras.utils.set_random_seed(0)
        lm = XLSTMCausalLM(new_backbone(**STYLES[style]))
        lm.compile(optimizer=keras.optimizers.AdamW(1e-3), weighted_metrics=[])
        lm.optimizer.build(lm.trainable_variables)
        ids = np.random.default_rng(0).integers(0, 256, (8, 33))
        x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((8, 32), int)}
        data = jax.tree.map(put, (x, ids[:, 1:], None))
        lm._symbolic_build(data_batch=data)
        state = lm._get_jax_state(
            trainable_variables=True,
            non_trainable_variables=True,
            optimizer_variables=True,
            metrics_variables=True,
        )
        placed = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(lm.train_step, out_shardings=(None, placed))
        program = step.lower(state, data).compile()
        totals = []  # of losses and of rows
        for _ in range(steps):
            _, state = program(state, data)
            totals.append([float(x) for x in state[3]])
        losses, rows = np.diff(totals, axis=0, prepend=0).T
        return losses / rows, program.as_text()
    finally:
        keras.distribution.set_distribution(None)


def put(x):
    distribution = keras.distribution.distribution()
    if distribution is None:
        return jax.numpy.asarray(x)
    return jax.device_put(x, distribution.get_data_layout(x.shape).backend_layout)


def collectives(program):
    """Kind and place of each: where several were joined, all places."""
    lines = (
        re.search(rf" {COLLECTIVE}(-start)?\(.*op_name=\"([^\"]*)", x) for x in program.split("\n")
    )
    return [(found[1], found[3]) for found in lines if found]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("distribution", [data_parallel, model_parallel])
def test_losses_of_twenty_steps_are_those_of_one_device(distribution, style):
    one, _ = train(None, style)
    many, _ = train(distribution, style)
    assert one[-1] < 0.8 * one[0]
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_data_parallel_adds_gradients_up_and_nothing_else():
    found = collectives(train(data_parallel, "large_slstm")[1])
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert not [place for _, place in found if "transpose" not in place and "loss" not in place]


def test_model_parallel_adds_up_twice_a_block_forward_and_backward():
    found = collectives(train(model_parallel, "large")[1])
    assert {kind for kind, _ in found} == {"all-reduce"}
    forward = [x for _, x in found if "jvp" in x and "transpose" not in x and "/stack/" in x]
    places = ["/ffn/down/dot_general", "/mlstm/output/dot_general"]
    assert sorted(x.split("block_0")[1] for x in forward) == places


@pytest.mark.parametrize("style", STYLES)
def test_memories_are_split_by_head_without_gathering(style):
    """Inside the operations devices exchange nothing but the sum of all weights' gradients."""
    _, program = train(model_parallel, style)
    inside = [x for x in collectives(program) if re.search(r"jit\(_?[ms]lstm\)", x[1])]
    assert all(kind == "all-reduce" and ":" in place for kind, place in inside) and len(inside) <= 1


def test_weights_are_split_over_the_model_axis():
    for style, options in STYLES.items():
        with model_parallel().scope():
            weights = new_backbone(**options).weights
        whole = [w.path for w in weights if "model" not in w.value.sharding.spec]
        rest = "norm/(scale|gamma)|seed_generator_state|slstm_cell/projection/kernel"
        assert not [x for x in whole if not re.search(rest, x)], style


def test_errors_of_layout_maps():
    with pytest.raises(ValueError, match="must be a `keras.distribution.DeviceMesh`"):
        XLSTMBackbone.get_layout_map((2, 4))
    with pytest.raises(ValueError, match="must be axes.*Received: 'heads'"):
        XLSTMBackbone.get_layout_map(mesh(), model_parallel_dim_name="heads")
