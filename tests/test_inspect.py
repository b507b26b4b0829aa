"""What `keras_xlstm.inspect` shows is what the oracle computes."""

import re

import keras
import numpy as np
import oracle
import pytest
from layer_cases import LAYERS, MASKS, SIZES, B, D, S, new_layer, noisy, numpy, random

from keras_xlstm import inspect
from keras_xlstm.layers import XLSTMBlockStack
from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

CLOSE = dict(rtol=1e-4, atol=1e-5)  # gates are float32
RESET = np.array([[0, 0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 1]], bool)


def heads(layer, dense, x, width):
    return (x @ numpy(dense.kernel)).reshape(*x.shape[:2], -1, width)


def oracle_states(kind, layer, x, state=None, **flags):
    """The states after each step, by the oracle, from the layer's weights and float64 arithmetic.

    Returns gates i and f as well, those of an mLSTM.
    """
    cell, x = layer.cell, x.astype("float64")
    if kind == "mlstm":
        k = heads(layer, cell.key, x, cell.key_dim)
        v = heads(layer, cell.value, x, cell.value_dim)
        gates = [
            15 * np.tanh((x @ numpy(g.kernel) + numpy(g.bias)) / 15)
            for g in (cell.input_gate, cell.forget_gate)
        ]
        inputs = (k, k, v, *gates)
        run = oracle.mlstm
    else:
        x = (x @ numpy(cell.projection.kernel)).reshape(*x.shape[:2], 4, layer.num_heads, -1)
        weights = [numpy(w).astype("float64") for w in cell.recurrence.weights]
        inputs, gates = (x,), None

        def run(gates, **options):
            return oracle.slstm(gates, *weights, **options)

    each = []
    for t in range(x.shape[1]):
        now = {name: flag[:, t : t + 1] for name, flag in flags.items()}
        _, state = run(*(y[:, t : t + 1] for y in inputs), initial_state=state, **now)
        each.append(state)
    return [np.stack(x, axis=1) for x in zip(*each, strict=True)], gates


@pytest.mark.parametrize("flags", ["none", "mask", "reset", "both"])
@pytest.mark.parametrize("kind", LAYERS)
def test_states_and_gates_are_the_oracles(kind, flags):
    layer, x = new_layer(kind, return_sequences=True), random(B, S, D)
    given = {"mask": MASKS["holes"], "reset": RESET}
    given = {name: given[name] for name in given if flags in (name, "both")}
    state = [0.3 * random(B, size, seed=n) for n, size in enumerate(layer.state_size)]
    state[-2] = np.abs(state[-2]) + 0.1  # n
    shaped = [numpy(y) for y in layer.cell._shaped(state)]
    wanted, gates = oracle_states(kind, layer, x, shaped, **given)

    (trace,) = inspect.trace(layer, x, initial_state=state, **given)
    assert (trace.name, trace.kind) == (layer.path, kind)
    for got, want in zip(trace.states(), wanted, strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_allclose(trace.m, wanted[-1], **CLOSE)
    for got, want in zip(trace.states([S - 1, -3]), wanted, strict=True):
        np.testing.assert_allclose(got, want[:, [S - 1, S - 3]], **CLOSE)

    happens = given.get("mask", np.ones((B, S), bool))
    reset = given.get("reset", np.zeros((B, S), bool)) & happens
    np.testing.assert_array_equal(trace.happens, happens)
    np.testing.assert_array_equal(trace.reset, reset)
    assert (trace.i[~happens] == -np.inf).all() and np.isfinite(trace.i[happens]).all()
    assert (trace.log_f[~happens] == 0).all() and (trace.log_f[reset] == -np.inf).all()
    if gates:
        np.testing.assert_allclose(trace.i[happens], gates[0][happens], **CLOSE)
        plain = happens & ~reset
        log_f = oracle.log_sigmoid(gates[1][plain])
        np.testing.assert_allclose(trace.log_f[plain], log_f, **CLOSE)

    # What it shows is what the layer computes.
    layer.return_state = True
    _, *last = layer(x, initial_state=state, **given)
    for got, want in zip(trace.states([-1]), last, strict=True):
        np.testing.assert_allclose(got.reshape(B, -1), numpy(want), rtol=1e-3, atol=1e-4)


def test_the_stabilizer_is_the_running_maximum():
    """m is the largest of what each write, and the start, have left: the maximum, not the sum."""
    layer, x = new_layer("mlstm"), random(B, S, D)
    (trace,) = inspect.trace(layer, x)
    for t in range(S):
        left = [trace.log_f[:, : t + 1].sum(axis=1)]  # of m = 0 at the start
        left += [trace.i[:, j] + trace.log_f[:, j + 1 : t + 1].sum(axis=1) for j in range(t + 1)]
        np.testing.assert_allclose(trace.m[:, t], np.max(left, axis=0), **CLOSE)


def test_effective_rank():
    rng = np.random.default_rng(0)
    orthogonal, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    one = np.outer(np.ones(6), [1, 2, 3])
    got = inspect.effective_rank([7 * orthogonal[:, :3], one, np.zeros((6, 3))])
    np.testing.assert_allclose(got, [3, 1, 0], atol=1e-6)
    half = inspect.effective_rank(np.diag([2.0, 1.0, 1.0]))
    np.testing.assert_allclose(half, 2**1.5)  # entropy of 1/2, 1/4, 1/4: 1.5 bits


def test_matrix_memories_fill_up():
    """After t steps C is a sum of t outer products, so its rank is at most t."""
    layer = new_layer("mlstm", units=8, key_dim=4)
    (trace,) = inspect.trace(layer, random(B, S, D))
    wanted, _ = oracle_states("mlstm", layer, random(B, S, D))
    C = trace.states()[0]
    ranks = inspect.effective_rank(C)
    np.testing.assert_allclose(ranks, inspect.effective_rank(wanted[0]), rtol=1e-3)
    np.testing.assert_allclose(ranks[:, 0], 1, rtol=1e-4)
    assert (ranks <= np.minimum(np.arange(1, S + 1), 4)[:, None] + 1e-6).all()


def test_half_life():
    log_f = np.log([[0.5, 0.5], [0.5, 0.125], [1.0, 1.0]])
    np.testing.assert_allclose(inspect.half_life(log_f, axis=1), [1, 0.5, np.inf])
    np.testing.assert_allclose(inspect.half_life(log_f[0]), 1)
    with_reset = [[-np.inf, np.log(0.5)], [-np.inf, -np.inf]]
    np.testing.assert_allclose(inspect.half_life(with_reset, axis=1), [1, np.nan])

    layer = new_layer("mlstm", gate_soft_cap=None)
    for gate in (layer.cell.forget_gate, layer.cell.input_gate):
        gate.kernel.assign(np.zeros(gate.kernel.shape))
    layer.cell.forget_gate.bias.assign([0.0, np.log(3)])  # gates 1/2 and 3/4
    x, flags = random(B, S, D), dict(mask=MASKS["holes"], reset=RESET)
    (trace,) = inspect.trace(layer, x, **flags)
    np.testing.assert_allclose(trace.half_life(), [1, np.log(2) / np.log(4 / 3)], rtol=1e-5)


def test_a_language_model():
    sizes = dict(num_layers=2, hidden_dim=16, num_heads=2, ffn_round_up_to=8, slstm_at=[1])
    model = noisy(XLSTMCausalLM(XLSTMBackbone(20, packed=True, **sizes)), 0.3)
    inputs = {
        "token_ids": np.arange(14).reshape(2, 7),
        "padding_mask": MASKS["left"],
        "segment_ids": np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 1]]),
    }
    before = numpy(model(inputs))
    traces = inspect.trace(model, inputs)
    assert [t.kind for t in traces] == ["mlstm", "slstm"]
    for index, trace in enumerate(traces):
        assert trace.name.startswith(f"stack/block_{index}")
        np.testing.assert_array_equal(trace.happens, MASKS["left"])
        assert np.argwhere(trace.reset).tolist() == [[0, 4]]
        assert trace.m.shape == ((2, 7, 2, 8) if trace.kind == "slstm" else (2, 7, 2))
    np.testing.assert_array_equal(numpy(model(inputs)), before)  # nothing is left behind


def test_a_stack_and_its_last_state():
    stack, x = XLSTMBlockStack(2, num_heads=2, slstm_at=(0,)), random(2, 9, 16)
    traces = inspect.trace(stack, x)  # it is not built yet
    assert [t.name for t in traces] == [f"{stack.name}/block_{n}" for n in (0, 1)]
    _, states = stack(x, return_state=True)
    for trace, (_, *state) in zip(traces, states, strict=True):  # without the convolution's
        for got, want in zip(trace.states([-1]), state, strict=True):
            np.testing.assert_allclose(got[:, 0], numpy(want), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_models_around_layers(kind):
    """Sequential and functional, both directions, masks from an embedding, states kept."""
    words, sizes = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 0]]), SIZES[kind]
    layer = LAYERS[kind](**sizes, return_sequences=True)
    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(9, 4, mask_zero=True),
            keras.layers.Bidirectional(layer),
        ]
    )
    forward, backward = inspect.trace(model, words)
    assert "forward" in forward.name and "backward" in backward.name
    np.testing.assert_array_equal(forward.happens, words > 0)
    np.testing.assert_array_equal(backward.happens, words[:, ::-1] > 0)

    inputs = keras.Input(batch_shape=(2, 5, D))
    stateful = LAYERS[kind](**sizes, stateful=True)
    model, x = keras.Model(inputs, stateful(inputs)), random(2, 5, D)
    (first,), (again,) = inspect.trace(model, x), inspect.trace(model, x)
    np.testing.assert_array_equal(first.m, again.m)
    model(x)
    (later,) = inspect.trace(model, x)
    assert np.abs(first.states([0])[0] - later.states([0])[0]).max() > 0


def test_a_model_without_any():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match="Received: plain, with 0 of them"):
        inspect.trace(model, random(2, 4))
    (trace,) = inspect.trace(new_layer("mlstm"), random(B, S, D))
    with pytest.raises(IndexError):
        trace.states([S])


def test_docstring_examples_run():
    documented = (inspect.trace, inspect.Trace.states, inspect.half_life, inspect.effective_rank)
    import keras_xlstm

    for thing in documented:
        (code,) = re.findall(r"```python\n(.*?)```", thing.__doc__, flags=re.DOTALL)
        lines = [line[8:] if line.startswith(" " * 8) else line[4:] for line in code.splitlines()]
        exec("\n".join(lines), {"keras": keras, "np": np, "keras_xlstm": keras_xlstm})
