"""`SLSTM` and `MLSTM` stand where `keras.layers.LSTM` stood."""

import keras
import numpy as np
import oracle
import pytest
from layer_cases import (
    LAYERS,
    MASKS,
    SIZES,
    UNITS,
    B,
    D,
    S,
    assert_close,
    flags,
    new_layer,
    noisy,
    numpy,
    random,
    run_layer_test,
)

each_kind = pytest.mark.parametrize("kind", LAYERS)
each_mask = pytest.mark.parametrize("mask", MASKS)
WEIGHTS = {"slstm": 3, "mlstm": 10}
STATE_WIDTHS = {"slstm": [6, 6, 6, 6], "mlstm": [2 * 2 * 3, 2 * 2, 2]}
ALL = dict(return_sequences=True, return_state=True)


@each_kind
@pytest.mark.parametrize(
    "options",
    [
        dict(dropout=0.5, kernel_regularizer="l2", bias_regularizer="l1"),
        dict(
            return_sequences=True,
            go_backwards=True,
            zero_output_for_mask=True,
            kernel_constraint="unit_norm",
            bias_constraint="non_neg",
        ),
    ],
    ids=["regularized", "constrained"],
)
def test_passes_keras_own_layer_test(kind, options):
    per_sequence = (S,) if "return_sequences" in options else ()
    losses = {"slstm": 2, "mlstm": 9}[kind] if "kernel_regularizer" in options else 0
    run_layer_test(
        LAYERS[kind],
        init_kwargs=SIZES[kind] | options,
        input_shape=(B, S, D),
        call_kwargs={"training": True},
        expected_output_shape=(B, *per_sequence, UNITS),
        expected_output_dtype="float32",
        expected_num_trainable_weights=WEIGHTS[kind],
        expected_num_non_trainable_weights=0,
        expected_num_seed_generators=1,
        expected_num_losses=losses,
        supports_masking=True,
    )


@each_kind
def test_returns_what_is_asked_for(kind):
    x = random(B, S, D)
    whole, *state = new_layer(kind, **ALL)(x)
    last, *same_state = new_layer(kind, return_state=True)(x)
    assert whole.shape == (B, S, UNITS)
    assert [s.shape[1] for s in state] == STATE_WIDTHS[kind]
    assert_close(new_layer(kind, return_sequences=True)(x), whole)
    assert_close(new_layer(kind)(x), whole[:, -1])
    assert_close([last, *same_state], [whole[:, -1], *state])


@each_kind
@pytest.mark.parametrize("return_sequences", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
def test_symbolic_shapes_and_dtypes_are_the_real_ones(kind, return_sequences, return_state):
    layer = new_layer(kind, return_sequences=return_sequences, return_state=return_state)
    flat = keras.tree.flatten
    real = flat(layer(random(B, S, D)))
    symbolic = flat(layer(keras.Input(batch_shape=(B, S, D))))
    shapes = layer.compute_output_shape((B, S, D))
    assert [x.shape for x in symbolic] == [tuple(x.shape) for x in real]
    assert [x.dtype for x in symbolic] == [keras.backend.standardize_dtype(x.dtype) for x in real]
    assert (list(shapes) if return_state else [shapes]) == [tuple(x.shape) for x in real]


@each_kind
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_go_backwards_is_the_flipped_input(kind, mask):
    x, flipped_mask = random(B, S, D), None
    if mask:
        mask = MASKS[mask]
        flipped_mask = mask[:, ::-1].copy()
    state = new_layer(kind, return_state=True)(random(B, S, D, seed=2))[1:]
    backward = new_layer(kind, go_backwards=True, **ALL)(x, mask=mask, initial_state=state)
    forward = new_layer(kind, **ALL)(x[:, ::-1].copy(), mask=flipped_mask, initial_state=state)
    assert_close(backward, forward)
    last = new_layer(kind, go_backwards=True)(x, mask=mask, initial_state=state)
    assert_close(last, forward[0][:, -1])


@each_kind
@pytest.mark.parametrize(
    "mask", [None, [1, 1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1, 1]], ids=str
)
@pytest.mark.parametrize("go_backwards", [False, True])
def test_packed_documents_are_read_each_by_itself(kind, mask, go_backwards):
    """Steps 0-2 and 3-6 are documents, or what the mask leaves of them."""
    given = None if mask is None else np.array([mask], bool)
    mask = np.ones(S, bool) if mask is None else given[0]
    first = 3 + np.argmax(mask[3:])  # a reset at a masked step would be ignored
    x, starts = random(1, S, D), np.arange(S) == first
    layer = new_layer(kind, go_backwards=go_backwards, return_sequences=True)
    packed = layer(x, mask=given, reset=starts[None])
    documents = [numpy(layer(x[:, steps][:, mask[steps]])) for steps in (slice(3), slice(3, S))]
    if go_backwards:
        mask, documents = mask[::-1], documents[::-1]
    assert_close(numpy(packed)[:, mask], np.concatenate(documents, axis=1))


@each_kind
def test_stateful_goes_on_until_reset(kind):
    x = random(B, 2 * S, D)
    wanted = new_layer(kind, return_sequences=True)(x)
    layer = new_layer(kind, return_sequences=True, stateful=True)
    for reset in (layer.reset_state, layer.reset_states):
        first, second = layer(x[:, :S]), layer(x[:, S:])
        assert_close(np.concatenate([numpy(first), numpy(second)], axis=1), wanted)
        reset()
    state = new_layer(kind, return_state=True)(x[:, :S])[1:]
    assert_close(layer(x[:, S:], initial_state=state), wanted[:, S:])  # instead of its own


@each_kind
def test_stateful_layers_take_the_weights_of_stateless_ones(kind):
    stateful, stateless = new_layer(kind, stateful=True), new_layer(kind)
    assert [w.path.split("/")[-1] for w in stateful.weights] == [
        w.path.split("/")[-1] for w in stateless.weights
    ]
    paths = {v.path for v in stateful.variables}
    assert len(paths) == len(stateless.variables) + len(STATE_WIDTHS[kind])


def stateful_model(kind):
    x = keras.Input(batch_shape=(B, S, D))
    layer = LAYERS[kind](**SIZES[kind], return_sequences=True, stateful=True)
    model = keras.Model(x, layer(x))
    noisy(layer)
    model.compile("sgd", "mse", jit_compile="auto")
    model.optimizer.learning_rate = 0.0  # weights stay, so that only the state can change
    return model, layer


@each_kind
@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_stateful_keeps_its_state_through_compiled_methods(kind, method):
    model, layer = stateful_model(kind)
    x = random(3 * B, S, D)  # three batches: pieces of B sequences
    y = np.zeros((3 * B, S, UNITS), "float32")
    if method == "predict":
        got = model.predict(x, batch_size=B, verbose=0)
    elif method == "evaluate":
        got = None
        model.evaluate(x, y, batch_size=B, verbose=0)
    else:
        got = None
        model.fit(x, y, batch_size=B, shuffle=False, verbose=0)
    sequences = np.concatenate(np.split(x, 3), axis=1)
    wanted, *state = new_layer(kind, **ALL)(sequences)
    assert_close(list(layer.states), state)
    if got is not None:
        assert_close(np.concatenate(np.split(got, 3), axis=1), wanted)
    layer.reset_state()
    assert_close(model.predict(x[:B], verbose=0), wanted[:, :S])


@each_kind
def test_stateful_refuses_another_batch_size(kind):
    layer = new_layer(kind, stateful=True)
    with pytest.raises(ValueError, match="Received: batch size 3, built for 2"):
        layer(random(3, S, D))
    with pytest.raises(ValueError, match="batch size must be static"):
        LAYERS[kind](**SIZES[kind], stateful=True)(keras.Input((S, D)))


@each_kind
def test_goes_on_from_an_initial_state(kind):
    x, layer = random(B, S, D), new_layer(kind, **ALL)
    whole, *state = layer(x)
    first, *middle = layer(x[:, :3])
    second, *last = layer(x[:, 3:], initial_state=middle)
    assert_close(np.concatenate([numpy(first), numpy(second)], axis=1), whole)
    assert_close(last, state)
    zeros = layer.get_initial_state(B)
    assert_close(layer(x, initial_state=zeros), [whole, *state])


@each_kind
def test_the_initial_state_can_be_an_input_of_a_model(kind):
    layer = new_layer(kind, **ALL)
    inputs = keras.Input((None, D))
    states = [keras.Input((width,)) for width in STATE_WIDTHS[kind]]
    model = keras.Model([inputs, *states], layer(inputs, initial_state=states))
    x = random(B, S, D)
    whole, *state = layer(x)
    middle = model.predict([x[:, :3], *numpy(layer.get_initial_state(B))], verbose=0)
    assert_close(middle[0], whole[:, :3])
    assert_close(model.predict([x[:, 3:], *middle[1:]], verbose=0), [whole[:, 3:], *state])


@each_kind
def test_an_encoder_hands_its_state_to_a_decoder(kind):
    """Training reaches the encoder only through the state."""
    source, target = keras.Input((None, D)), keras.Input((None, D))
    encoder, decoder = new_layer(kind, return_state=True), new_layer(kind, return_sequences=True)
    _, *state = encoder(source)
    model = keras.Model([source, target], decoder(target, initial_state=state))
    model.compile("sgd", "mse")
    kernel = encoder.weights[{"slstm": 0, "mlstm": 1}[kind]]  # of all gates, and of the keys
    before = numpy(kernel)
    model.fit([random(B, S, D), random(B, 4, D)], random(B, 4, UNITS), verbose=0)
    assert np.abs(numpy(kernel) - before).max() > 1e-6


@each_kind
@each_mask
def test_masked_steps_do_not_happen(kind, mask):
    x, mask = random(B, S, D), MASKS[mask]
    held, *state = new_layer(kind, **ALL)(x, mask=mask)
    zeroed = numpy(new_layer(kind, zero_output_for_mask=True, **ALL)(x, mask=mask)[0])
    last, garbage = new_layer(kind)(x, mask=mask), np.where(mask[..., None], x, 1e3)
    assert_close(new_layer(kind, **ALL)(garbage.astype("float32"), mask=mask), [held, *state])
    for row in range(B):
        happened = mask[row]
        alone, *alone_state = numpy(new_layer(kind, **ALL)(x[row : row + 1, happened]))
        assert_close([s[row : row + 1] for s in state], alone_state)
        assert_close(zeroed[row, happened], alone[0])
        assert np.all(zeroed[row, ~happened] == 0)
        assert_close(last[row], alone[0, -1])
        index = np.cumsum(happened) - 1  # the last step that happened
        assert_close(held[row], np.where(index[:, None] >= 0, alone[0, index], 0.0))


@each_kind
def test_a_row_of_masked_steps_only_changes_nothing(kind):
    x, layer = random(B, S, D), new_layer(kind, **ALL)
    mask = flags([0] * S, [1] * S)
    state = layer(random(B, S, D, seed=2))[1:]
    y, *after = layer(x, mask=mask, initial_state=state)
    assert np.all(numpy(y)[0] == 0)
    assert_close([s[0] for s in after], [s[0] for s in state], rtol=0, atol=0)
    assert np.all(numpy(new_layer(kind)(x, mask=mask))[0] == 0)


@each_kind
@pytest.mark.parametrize("source", ["embedding", "masking"])
@pytest.mark.parametrize("with_state", [False, True])
def test_masks_come_with_the_inputs(kind, source, with_state):
    mask = MASKS["holes"]
    if source == "embedding":
        inputs = np.where(mask, [[1, 2, 3, 1, 2, 3, 1]], 0)
        before = keras.layers.Embedding(4, D, mask_zero=True)
    else:
        inputs = np.where(mask[..., None], random(B, S, D), 0).astype("float32")
        before = keras.layers.Masking()
    layer = new_layer(kind, return_sequences=True)
    x = before(inputs)
    state = new_layer(kind, return_state=True)(random(B, S, D))[1:] if with_state else None
    wanted = layer(numpy(x), mask=mask, initial_state=state)
    y = layer(x, initial_state=state)
    assert_close(y, wanted)
    np.testing.assert_array_equal(numpy(y._keras_mask) > 0, mask)  # handed on
    assert getattr(new_layer(kind)(x), "_keras_mask", None) is None
    symbolic = keras.Input(inputs.shape[1:], dtype=inputs.dtype.name)
    outputs = layer(before(symbolic), initial_state=state)
    assert_close(keras.Model(symbolic, outputs).predict(inputs, verbose=0), wanted)


@each_kind
def test_dropout_draws_once_a_sequence(kind):
    x = random(B, S, D)
    plain, layer = new_layer(kind), new_layer(kind, dropout=0.5, seed=1)
    assert_close(layer(x), plain(x))
    assert_close(layer(x, training=False), plain(x))
    draws = 2.0 * np.array(np.meshgrid(*[[0, 1]] * D)).reshape(D, -1).T  # all that can be drawn
    for row, y in enumerate(numpy(layer(x, training=True))):
        dropped = x[row] * draws[:, None]
        distance = np.abs(numpy(plain(dropped.astype("float32"))) - y).max(axis=1)
        assert np.sort(distance)[0] < 1e-4 < np.sort(distance)[1]


@each_kind
def test_dropout_follows_its_seed(kind):
    x, options = random(B, S, D), dict(dropout=0.3)
    if kind == "slstm":
        options["recurrent_dropout"] = 0.3
    first, second = (new_layer(kind, seed=3, **options) for _ in range(2))
    draws = [numpy(first(x, training=True)) for _ in range(4)]
    assert_close([second(x, training=True) for _ in range(4)], draws)
    assert any(np.abs(draw - draws[0]).max() > 1e-3 for draw in draws)


def test_recurrent_dropout_draws_once_a_sequence():
    """What it drops of h is what a recurrent kernel without these rows does not see."""
    x, plain = random(B, S, D), new_layer("slstm", return_sequences=True)
    layer = new_layer("slstm", return_sequences=True, recurrent_dropout=0.5, seed=1)
    assert_close(layer(x), plain(x))
    kernel, R, bias = (numpy(w).astype("float64") for w in plain.weights)
    gates = (x @ kernel).reshape(B, S, 4, 2, 3)
    draws = 2.0 * np.array(np.meshgrid(*[[0, 1]] * UNITS)).reshape(UNITS, -1).T
    candidates = np.stack(
        [oracle.slstm(gates, R * draw.reshape(2, 3, 1, 1), bias)[0] for draw in draws]
    )
    y = numpy(layer(x, training=True)).reshape(B, S, 2, 3)
    distance = np.sort(np.abs(candidates - y).max(axis=(2, 3, 4)), axis=0)
    assert np.all(distance[0] < 1e-4)
    assert np.all(distance[1] > 1e-4)


@each_kind
@pytest.mark.parametrize("merge_mode", ["sum", "mul", "ave", "concat", None])
def test_bidirectional(kind, merge_mode):
    forward = LAYERS[kind](**SIZES[kind], **ALL)
    layer = keras.layers.Bidirectional(forward, merge_mode=merge_mode)
    x, mask = random(B, S, D), MASKS["right"]
    layer.build((B, S, D))
    for wrapped in (layer.forward_layer, layer.backward_layer):
        noisy(wrapped)
    y, *states = numpy(layer(x, mask=mask))
    if merge_mode is None:
        y, states = [y, states[0]], states[1:]
    zeroed = dict(zero_output_for_mask=True, **ALL)
    ahead, *ahead_state = numpy(new_layer(kind, **zeroed)(x, mask=mask))
    back, *back_state = numpy(new_layer(kind, go_backwards=True, **zeroed)(x, mask=mask))
    back = back[:, ::-1]
    merged = {
        "sum": ahead + back,
        "mul": ahead * back,
        "ave": (ahead + back) / 2,
        "concat": np.concatenate([ahead, back], axis=-1),
        None: [ahead, back],
    }
    assert_close(y, merged[merge_mode])
    assert_close(states, [*ahead_state, *back_state])
    again = keras.layers.Bidirectional.from_config(layer.get_config())
    assert again.backward_layer.go_backwards and not again.forward_layer.go_backwards


@each_kind
def test_time_distributed(kind):
    x = random(B, 3, S, D)
    layer = new_layer(kind)
    y = keras.layers.TimeDistributed(layer)(x)
    assert_close(y, np.stack([numpy(layer(x[:, t])) for t in range(3)], axis=1))


@each_kind
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_one_model_trains_on_any_batch_and_length(kind, run_eagerly):
    x = keras.Input((None, D))
    model = keras.Model(x, keras.layers.Dense(1)(LAYERS[kind](**SIZES[kind], dropout=0.2)(x)))
    jit_compile = not run_eagerly and keras.backend.backend() != "torch"  # torch needs a compiler
    model.compile("sgd", "mse", run_eagerly=run_eagerly, jit_compile=jit_compile)
    before = numpy(model.trainable_variables)
    for rows, steps in ((3, 1),) if run_eagerly else ((2, 7), (3, 1)):
        x, y = random(rows, steps, D), np.ones((rows, 1), "float32")
        assert np.isfinite(model.train_on_batch(x, y))
        assert model.predict_on_batch(x).shape == (rows, 1)
    after = numpy(model.trainable_variables)
    moved = [np.abs(a - b).max() for a, b in zip(after, before, strict=True)]
    assert np.all(np.isfinite(moved)) and max(moved) > 1e-6


@each_kind
def test_has_the_arguments_of_lstm(kind):
    """All but those that name LSTM's own equations and kernels, and what mLSTM cannot have."""
    own = "activation recurrent_activation use_bias unit_forget_bias implementation use_cudnn"
    if kind == "mlstm":
        own += " recurrent_initializer recurrent_regularizer recurrent_constraint"
        own += " recurrent_dropout bias_initializer"  # in its place: where each gate starts
    config = LAYERS[kind](**SIZES[kind]).get_config()
    for name, default in keras.layers.LSTM(UNITS).get_config().items():
        if name not in own.split():
            assert name in config
            if isinstance(default, (bool, float)):
                assert config[name] == default
    losses = LAYERS[kind](**SIZES[kind], activity_regularizer="l2")
    again = LAYERS[kind].from_config(losses.get_config())
    again(random(B, S, D))
    assert len(again.losses) == 1
