"""Models on a mesh of eight devices, which `conftest.py` asks of JAX on a CPU."""

import functools
import importlib.util
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import conformance
import keras
import numpy as np
import pytest
from conformance import BOTH, MLSTM_CASES

from keras_xlstm import kernels
from keras_xlstm.distribution import SequenceParallel
from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM
from keras_xlstm.ops import mlstm

if keras.backend.backend() != "jax":
    pytest.skip("Keras 3.15 distributes on JAX only", allow_module_level=True)
import jax
from jax.sharding import NamedSharding, PartitionSpec
from keras_xlstm_pallas.partition import by_batch_and_head

STYLES = {
    "large": {},
    "large_slstm": dict(slstm_at=(0,)),
    "original": dict(block_style="original"),
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


def sequence_parallel(shape=(1, 8)):
    devices = keras.distribution.DeviceMesh(shape, ("batch", "sequence"))
    return SequenceParallel(layout_map=keras.distribution.LayoutMap(devices))


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
@pytest.mark.parametrize("distribution", [data_parallel, model_parallel, sequence_parallel])
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


SEQUENCES = {
    "200-steps": MLSTM_CASES["200-steps"],
    "mask-and-reset": replace(BOTH, S=64),
    "mask-all": replace(MLSTM_CASES["mask-all"], S=64),
    "i-f-mixed": replace(MLSTM_CASES["i-f-mixed-mask-and-reset"], S=64),
    "bfloat16": replace(MLSTM_CASES["bfloat16"], S=64),
}


@pytest.mark.parametrize("op", ["mlstm", "slstm"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_over_devices(name, op):
    with sequence_parallel((2, 4) if SEQUENCES[name].B > 1 else (1, 8)).scope():
        conformance.check_all(op, "sequence", SEQUENCES[name])
    conformance.form.cache_clear()  # compiled for this distribution
    conformance.answers.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
def test_what_devices_exchange_does_not_grow_with_the_sequence(backward):
    """A state for each doubling of their number, one to the next device, and the last one."""

    def exchanged(S):
        distribution = sequence_parallel()
        x, gate = (
            jax.ShapeDtypeStruct(
                shape, "float32", sharding=distribution.get_data_layout(shape).backend_layout
            )
            for shape in ((2, S, 2, 8), (2, S, 2))
        )

        def function(*args):
            h, state = mlstm(*args, return_state=True)
            return h.sum() + state[0].sum() if backward else (h, state)

        run = jax.grad(function, argnums=range(5)) if backward else function
        with distribution.scope():
            program = jax.jit(run).lower(x, x, x, gate, gate).compile().as_text()
        return Counter(re.findall(rf"= (.*) {COLLECTIVE}(?:-start)?\(", program))

    short = exchanged(64)
    assert short == exchanged(512)
    states = [n for (x, kind), n in short.items() if kind != "all-reduce" and "8,8" in x]
    assert sum(states) == (3 + 1) * (1 + backward)
    assert {kind for _, kind in short} <= {"collective-permute", "all-reduce"}


def test_sequence_parallel_exchanges_states_and_the_sum_of_gradients():
    found = collectives(train(sequence_parallel, "large")[1])
    assert {kind for kind, _ in found} == {"collective-permute", "all-reduce"}
    permuted = [place for kind, place in found if kind == "collective-permute"]
    assert all("/mlstm/" in place for place in permuted)


@pytest.mark.long
def test_two_processes_train_as_one_and_go_on_after_a_kill(monkeypatch):
    """The example, in processes of their own, which have a device each."""
    path = Path(__file__).resolve().parents[1] / "examples" / "train_distributed.py"
    spec = importlib.util.spec_from_file_location("train_distributed", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setenv("XLA_FLAGS", re.sub(r"--xla_force\S+", "", os.environ["XLA_FLAGS"]))
    one, two = example.train(1, epochs=2), example.train(2, epochs=2, killed_after=0)
    assert one[1] < one[0]
    np.testing.assert_allclose(two, one, rtol=1e-5)


SMALL = {
    "mlstm": conformance.Case(S=20, B=4, NH=2, DHQK=8, DHHV=8, chunk_size=16),
    "slstm": conformance.Case(S=3, B=4, NH=2, DHHV=3, mask="holes", reset="some"),
}
# Of the inputs of each operation, then of its state.
AXES = {
    "mlstm": ["B S NH"] * 5 + ["B NH"] * 3,
    "slstm": ["B S 4 NH", "NH", "4 NH"] + ["B NH"] * 4,
}


@pytest.mark.parametrize("op", SMALL)
def test_pallas_kernels_are_cut_by_batch_and_head(monkeypatch, op):
    """Interpreted: devices exchange nothing but what a batch adds up to for weights."""
    monkeypatch.setenv("KERAS_XLSTM_PALLAS", "interpret-gpu")
    case, axes = SMALL[op], AXES[op]
    devices = jax.sharding.Mesh(np.reshape(jax.devices(), (4, 2)), ("B", "NH"))

    def place(arrays, axes):
        names = [[x if x in ("B", "NH") else None for x in names.split()] for names in axes]
        places = [NamedSharding(devices, PartitionSpec(*x)) for x in names]
        return [jax.device_put(x, y) for x, y in zip(arrays, places, strict=True)]

    options = {"chunk_size": case.chunk_size} if op == "mlstm" else {}
    options |= {"kernel": "pallas", "return_state": True}

    def outputs(tensors):
        h, state = conformance.call(op, conformance.OPS[op].ours, tensors, case.flags(), **options)
        return h, *state

    def gradients(tensors, slopes):
        return jax.vjp(outputs, tensors)[1](slopes)[0]

    tensors = list(conformance.truth(op, case).tensors.values())
    expected = outputs(tensors)
    slopes = tuple(x + 1 for x in expected)
    of_results = ["B S NH", *[x for x in axes if x == "B NH"]]
    placed = place(tensors, axes)
    calls = {
        outputs: ([placed], of_results, expected),
        gradients: ([placed, tuple(place(slopes, of_results))], axes, gradients(tensors, slopes)),
    }
    for function, (arguments, where, wanted) in calls.items():
        program = jax.jit(function).lower(*arguments).compile()
        got = program(*arguments)
        for x, y, z in zip(got, wanted, place(got, where), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
            assert x.sharding.is_equivalent_to(z.sharding, x.ndim)
        kinds = {kind for kind, _ in collectives(program.as_text())}
        adds_up = function is gradients and op == "slstm"
        assert kinds == ({"all-reduce"} if adds_up else set())


def test_kernels_for_tpus_are_cut_along_the_mesh_of_keras():
    """Where XLA does not ask. Of any function, since TPUs' interpreter has one device."""
    rng = np.random.default_rng(0)
    shapes = (4, 6, 4, 5), (4, 5, 3), (4, 4, 3, 2)
    x, R, C = (rng.normal(size=shape).astype("float32") for shape in shapes)

    def function(x, R, C):
        return jax.numpy.einsum("bshd,hde,bhef->bshf", x, R, C), C.sum(-1)

    axes = ("B S NH D", "NH D E", "B NH E F"), ("B S NH F", "B NH E")
    with model_parallel().scope():
        cut = by_batch_and_head(function, *axes, on_tpu=True)
        place = NamedSharding(mesh().backend_mesh, PartitionSpec("batch", None, "model"))
        arguments = jax.device_put(x, place), R, C
        program = jax.jit(cut).lower(*arguments).compile()
    for got, wanted in zip(program(*arguments), function(x, R, C), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
        assert got.sharding.shard_shape(got.shape)[0] == 2  # of 4 rows
    assert not collectives(program.as_text())


def test_explain_sequences():
    q = np.zeros((2, 20, 2, 8), "float32")
    said = kernels.explain(q, q, q, q[..., 0], q[..., 0])
    assert (
        "- sequence: needs `keras_xlstm.distribution.SequenceParallel`, received no distribution"
        in said
    )
    with sequence_parallel().scope():
        said = kernels.explain(q, q, q, q[..., 0], q[..., 0])
        assert "- sequence: needs a length that 8 devices can share, received 20" in said
        said = kernels.explain(q[:, :16], q[:, :16], q[:, :16], q[:, :16, :, 0], q[:, :16, :, 0])
        assert "* sequence: serves this call, in 8 segments, a device each" in said


def test_errors_of_sequence_parallel():
    with pytest.raises(ValueError, match="must be axes of the mesh.*Received: 'sequence'"):
        SequenceParallel(layout_map=keras.distribution.LayoutMap(mesh()))


def test_errors_of_layout_maps():
    with pytest.raises(ValueError, match="must be a `keras.distribution.DeviceMesh`"):
        XLSTMBackbone.get_layout_map((2, 4))
    with pytest.raises(ValueError, match="must be axes.*Received: 'heads'"):
        XLSTMBackbone.get_layout_map(mesh(), model_parallel_dim_name="heads")
