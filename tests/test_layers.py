"""`SLSTM`, `MLSTM` and their cells: numbers, precision, configuration, saving, errors."""

import inspect
import json

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_cases import (
    CELLS,
    LAYERS,
    MASKS,
    SIZES,
    UNITS,
    B,
    D,
    S,
    assert_close,
    new_cell,
    new_layer,
    noisy,
    numpy,
    random,
)

from keras_xlstm.layers import MLSTM

each_kind = pytest.mark.parametrize("kind", LAYERS)
ALL = dict(return_sequences=True, return_state=True)
RESET = np.array([[0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 1, 0, 0]], bool)


def numpy_mlstm(layer, x, **flags):
    """The mLSTM layer of the 7B model in float64, from the layer's weights."""
    cell, x = layer.cell, x.astype("float64")
    NH, heads = cell.num_heads, (*x.shape[:2], cell.num_heads, -1)

    def dense(x, projection):
        kernel, *bias = (numpy(w).astype("float64") for w in projection.weights)
        return x @ kernel + (bias[0] if bias else 0)

    q, k, v = (dense(x, part).reshape(heads) for part in (cell.query, cell.key, cell.value))
    i, f = (15 * np.tanh(dense(x, part) / 15) for part in (cell.input_gate, cell.forget_gate))
    h, state = oracle.mlstm(q, k, v, i, f, **flags)
    deviation = np.sqrt(h.var(axis=-1, keepdims=True) + 1e-6)
    h = (h - h.mean(axis=-1, keepdims=True)) / deviation * numpy(cell.norm.scale)
    h = oracle.sigmoid(dense(x, cell.output_gate)) * h.reshape(*x.shape[:2], NH * h.shape[-1])
    return dense(h, cell.output_projection), state


def numpy_slstm(layer, x, **flags):
    kernel, R, bias = (numpy(w).astype("float64") for w in layer.weights)
    NH, DH = R.shape[:2]
    gates = (x.astype("float64") @ kernel).reshape(*x.shape[:2], 4, NH, DH)
    h, state = oracle.slstm(gates, R, bias, **flags)
    return h.reshape(*x.shape[:2], NH * DH), state


NUMPY = {"slstm": numpy_slstm, "mlstm": numpy_mlstm}


@each_kind
@pytest.mark.parametrize("mask", [None, "holes"])
@pytest.mark.parametrize("reset", [None, RESET], ids=["", "reset"])
def test_numbers_are_those_of_the_equations(kind, mask, reset):
    layer, x = new_layer(kind, zero_output_for_mask=True, **ALL), random(B, S, D)
    mask = MASKS.get(mask)
    _, state = NUMPY[kind](layer, random(B, S, D, seed=2))
    wanted, wanted_state = NUMPY[kind](layer, x, mask=mask, reset=reset, initial_state=state)
    y, *state = layer(x, mask=mask, reset=reset, initial_state=[s.astype("float32") for s in state])
    assert_close([y, *state], [wanted, *(s.reshape(B, -1) for s in wanted_state)], rtol=1e-4)


def test_mlstm_width_options():
    """A value width that is not units / heads, no soft cap, another epsilon: sizes follow."""
    layer = MLSTM(5, num_heads=3, key_dim=4, value_dim=2, gate_soft_cap=None)
    layer.build((None, None, D))
    assert [tuple(w.shape) for w in layer.weights] == [
        (D, 12), (D, 12), (D, 6), (D, 6), (D, 3), (3,), (D, 3), (3,), (3, 2), (6, 5)
    ]  # fmt: skip
    assert layer.state_size == [3 * 4 * 2, 3 * 4, 3]
    capped = MLSTM(5, num_heads=3, key_dim=4, value_dim=2, gate_soft_cap=1.0)
    capped.build((None, None, D))
    x = random(B, S, D)
    assert np.abs(numpy(noisy(layer)(x)) - numpy(noisy(capped)(x))).max() > 1e-3
    default = MLSTM(8, num_heads=2)
    assert (default.cell.key_dim, default.cell.value_dim) == (2, 4)


@each_kind
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_a_cell_in_keras_rnn_is_the_layer(kind, mask):
    x, layer = random(B, S, D), new_layer(kind, zero_output_for_mask=True, **ALL)
    rnn = keras.layers.RNN(CELLS[kind](**SIZES[kind]), zero_output_for_mask=True, **ALL)
    rnn.build((B, S, D))
    rnn.set_weights(layer.get_weights())
    mask = MASKS.get(mask)
    assert_close(rnn(x, mask=mask), layer(x, mask=mask))
    layer.set_weights(new_cell(kind).get_weights())  # and the other way


@each_kind
def test_an_unrolled_cell_holds_its_output_like_the_layer(kind):
    x, mask = random(B, S, D), MASKS["holes"]
    rnn = keras.layers.RNN(new_cell(kind), unroll=True, return_sequences=True)
    assert_close(rnn(x, mask=mask), new_layer(kind, return_sequences=True)(x, mask=mask))


@pytest.mark.parametrize("kinds", [("slstm", "mlstm"), ("mlstm", "slstm")], ids=str)
def test_stacked_cells_are_stacked_layers(kinds):
    x = random(B, S, D)
    rnn = keras.layers.RNN([CELLS[kind](**SIZES[kind]) for kind in kinds], **ALL)
    y, *states = rnn(x)
    h, wanted = x, []
    for kind, cell in zip(kinds, rnn.cell.cells, strict=True):
        layer = LAYERS[kind](**SIZES[kind], **ALL)
        layer.build(h.shape)
        layer.set_weights(cell.get_weights())
        h, *state = layer(h)
        wanted.append(state)
    assert_close([y, states], [h, wanted])


@each_kind
@pytest.mark.parametrize("shaped", [False, True])
def test_a_cell_goes_on_from_the_state_of_the_layer(kind, shaped):
    x, cell = random(B, S, D), new_cell(kind)
    whole, *last = new_layer(kind, **ALL)(x)
    _, *state = new_layer(kind, **ALL)(x[:, :4])
    if shaped:
        shapes = {"slstm": [(2, 3)] * 4, "mlstm": [(2, 2, 3), (2, 2), (2,)]}[kind]
        state = [ops.reshape(s, (B, *shape)) for s, shape in zip(state, shapes, strict=True)]
        assert_close(new_layer(kind, **ALL)(x[:, 4:], initial_state=state), [whole[:, 4:], *last])
    for t in range(4, S):
        y, new = cell(x[:, t], state)
        assert [s.shape for s in new] == [s.shape for s in state]
        assert_close(y, whole[:, t])
        state = new
    assert_close([ops.reshape(s, (B, -1)) for s in state], last)


POLICIES = ["mixed_bfloat16", "mixed_float16", "bfloat16", "float16"]


@each_kind
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_set_the_output_and_leave_the_state(kind, policy):
    policy, x = keras.DTypePolicy(policy), random(B, S, D)
    layer, exact, rounded = (new_layer(kind, dtype=p, **ALL) for p in (policy, None, None))
    y, *state = layer(x)
    standard = keras.backend.standardize_dtype
    assert standard(y.dtype) == policy.compute_dtype
    assert {standard(s.dtype) for s in state} == {"float32"}
    for w in layer.weights:
        gate = kind == "mlstm" and ("input_gate" in w.path or "forget_gate" in w.path)
        assert standard(w.dtype) == ("float32" if gate else policy.variable_dtype), w.path

    # What rounding the input and the weights once costs, six times: there are roundings between.
    def once(x):
        return numpy(ops.cast(x, policy.compute_dtype))

    for w in rounded.weights:
        w.assign(once(w.value))
    wanted, other = numpy(exact(x)), numpy(rounded(once(x)))
    first, *middle = layer(x[:, :4])
    second, *last = layer(x[:, 4:], initial_state=middle)
    pieces = [np.concatenate([numpy(first), numpy(second)], axis=1), *last]
    for got in ([y, *state], pieces):
        for a, b, c in zip(got, wanted, other, strict=True):
            assert_close(a, b, atol=6 * np.abs(b - c).max(), rtol=0)


@pytest.mark.parametrize("wrapper", [None, keras.layers.Bidirectional], ids=["", "bidirectional"])
def test_gates_are_float32_under_a_mixed_policy(wrapper):
    """Of an input of zeros, m is the forget gate's bias or the input gate's, to float32's digits.

    An outer layer's mixed policy must not reach the weights of the gates.
    """
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mlstm, x = MLSTM(UNITS, num_heads=2, return_state=True), keras.Input((1, D))
        layer = mlstm if wrapper is None else wrapper(mlstm)
        model = keras.Model(x, layer(x))
    finally:
        keras.config.set_dtype_policy("float32")
    layer = getattr(layer, "forward_layer", layer)
    i, f = np.array([0.3, -9.1]), np.array([3.3, -0.7])
    layer.cell.input_gate.bias.assign(i)
    layer.cell.forget_gate.bias.assign(f)
    m = model.predict(np.zeros((1, 1, D), "float32"), verbose=0)[3]
    wanted = np.maximum(oracle.log_sigmoid(15 * np.tanh(f / 15)), 15 * np.tanh(i / 15))
    assert_close(m, wanted[None], rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_trains_in_mixed_precision(kind, policy):
    x = keras.Input((S, D))
    layer = LAYERS[kind](**SIZES[kind], dtype=policy)
    y = keras.layers.Dense(1, dtype="float32")(layer(x))
    model = keras.Model(x, y)
    optimizer = keras.optimizers.Adam(0.01)
    if policy == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0**10)
    model.compile(optimizer, "mse")
    inputs = random(8, S, D)
    history = model.fit(inputs, inputs[:, :1, 0], batch_size=8, epochs=8, verbose=0)
    losses = history.history["loss"]
    assert losses[-1] < losses[0]
    assert all(np.isfinite(numpy(w)).all() for w in layer.weights)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@each_kind
def test_a_cell_takes_the_state_in_the_dtype_that_keras_gives_it(kind, policy):
    x, policy = random(B, S, D), keras.DTypePolicy(policy)
    rnn = keras.layers.RNN(new_cell(kind, dtype=policy), dtype=policy, **ALL)
    for got, wanted in zip(rnn(x), new_layer(kind, **ALL)(x), strict=True):
        assert keras.backend.standardize_dtype(got.dtype) == policy.compute_dtype
        assert_close(got, wanted, atol=0.15, rtol=0.15)  # here the state is rounded at every step


OPTIONS = {
    "slstm": dict(
        units=8,
        num_heads=2,
        kernel_initializer="ones",
        recurrent_initializer="he_normal",
        bias_initializer="zeros",
        recurrent_regularizer="l2",
        recurrent_constraint="unit_norm",
        recurrent_dropout=0.2,
    ),
    "mlstm": dict(
        units=8,
        num_heads=2,
        key_dim=3,
        value_dim=5,
        gate_soft_cap=None,
        input_gate_bias=-1.0,
        forget_gate_bias=(1.0, 2.0),
        norm_epsilon=1e-3,
        denominator_epsilon=1e-4,
        kernel_initializer="ones",
        output_initializer="he_normal",
        chunk_size=7,
    ),
}
SHARED_OPTIONS = dict(
    kernel_regularizer="l1",
    bias_regularizer="l2",
    kernel_constraint="max_norm",
    bias_constraint="non_neg",
    dropout=0.1,
    seed=5,
    kernel="some",
)
LAYER_OPTIONS = dict(
    return_sequences=True, return_state=True, go_backwards=True, stateful=True, name="mine",
    zero_output_for_mask=True, trainable=False, dtype="mixed_bfloat16", unroll=True,
    activity_regularizer="l1",
)  # fmt: skip


@each_kind
@pytest.mark.parametrize("is_cell", [False, True])
def test_every_option_survives_a_round_trip(kind, is_cell):
    cls = CELLS[kind] if is_cell else LAYERS[kind]
    options = OPTIONS[kind] | SHARED_OPTIONS | (dict(name="mine") if is_cell else LAYER_OPTIONS)
    named = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    assert named <= set(options)  # an option that is added must be added here
    config, default = cls(**options).get_config(), cls(8, num_heads=1).get_config()
    assert set(options) <= set(config)
    assert all(config[name] != default[name] for name in set(options) - {"units"})
    json_config = json.loads(json.dumps(keras.saving.serialize_keras_object(cls(**options))))
    again = keras.saving.deserialize_keras_object(json_config)
    assert type(again) is cls
    assert json.dumps(again.get_config()) == json.dumps(config)


@each_kind
def test_saves_and_loads(kind, tmp_path):
    """A model with a mask, a backward half, and states as inputs and outputs."""
    tokens = keras.Input((S,), dtype="int32")
    layer = new_layer(kind, return_state=True)
    states = [keras.Input((size,)) for size in layer.state_size]
    x = keras.layers.Embedding(5, D, mask_zero=True)(tokens)
    both = keras.layers.Bidirectional(LAYERS[kind](**SIZES[kind], return_sequences=True))
    model = keras.Model([tokens, *states], [*layer(x, initial_state=states), both(x)])
    inputs = np.array([[1, 2, 3, 0, 4, 0, 0], [0, 3, 3, 1, 0, 2, 4]], "int32")
    state = [np.abs(random(B, size)) for size in layer.state_size]
    wanted = model.predict([inputs, *state], verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(again.predict([inputs, *state], verbose=0), wanted)
    model.save_weights(tmp_path / "model.weights.h5")
    for w in again.weights:
        w.assign(ops.zeros_like(w.value))
    again.load_weights(tmp_path / "model.weights.h5")
    assert_close(again.predict([inputs, *state], verbose=0), wanted)


@each_kind
def test_a_stateful_model_loads_with_a_fresh_state(kind, tmp_path):
    layer, inputs = new_layer(kind, stateful=True), keras.Input(batch_shape=(B, S, D))
    model, x = keras.Model(inputs, layer(inputs)), random(B, S, D)
    wanted = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(again.predict(x, verbose=0), wanted)


@each_kind
def test_regularizers_and_constraints_hold_for_their_weights(kind):
    layer = LAYERS[kind](
        **SIZES[kind],
        kernel_regularizer=keras.regularizers.L1(1.0),
        bias_regularizer=keras.regularizers.L2(1.0),
        kernel_constraint="non_neg",
        bias_constraint="unit_norm",
    )
    layer.build((None, None, D))
    kernels, biases = [], []
    for w in noisy(layer).weights:
        name = w.path.split("/")[-1]
        if name in ("kernel", "bias"):
            (kernels if name == "kernel" else biases).append(w)
            assert w.regularizer is not None and w.constraint is not None
        else:
            assert w.regularizer is None and w.constraint is None
    wanted = sum(np.abs(numpy(w)).sum() for w in kernels) + sum(
        np.square(numpy(w)).sum() for w in biases
    )
    layer(random(B, S, D))
    np.testing.assert_allclose(float(sum(layer.losses)), wanted, rtol=1e-5)
    assert len(kernels) == {"slstm": 1, "mlstm": 7}[kind]


@each_kind
def test_inputs_that_cannot_be(kind):
    layer, x = new_layer(kind), random(B, S, D)
    with pytest.raises(ValueError, match="expected ndim=3, found ndim=2"):
        layer(x[:, 0])
    with pytest.raises(ValueError, match=r"`mask` must have the shape \(B, S\)"):
        layer(x, mask=np.ones((B, S + 1), bool))
    with pytest.raises(ValueError, match=r"`reset` must have the shape \(B, S\)"):
        layer(x, reset=np.ones((B + 1, S), bool))
    with pytest.raises(ValueError, match="`kernel` must be 'auto' or name a kernel"):
        new_layer(kind, kernel="none such")(x)
