"""The blocks and the stack: numbers, streaming, padding, packing, training."""

import functools
import math

import keras
import numpy as np
import oracle
import pytest
from keras import tree
from layer_cases import assert_close, noisy, numpy, random

from keras_xlstm.layers import (
    MLSTMBlock,
    SLSTMBlock,
    XLSTMBlockStack,
    XLSTMLargeBlock,
    ZeroCenteredLayerNorm,
)

B, S, D = 2, 6, 8
BLOCKS = {
    "mlstm": functools.partial(MLSTMBlock, num_heads=2, proj_round_up_to=4, chunk_size=2),
    "slstm": functools.partial(SLSTMBlock, num_heads=2, ffn_round_up_to=4),
    "large": functools.partial(XLSTMLargeBlock, num_heads=2, ffn_round_up_to=4, chunk_size=2),
}
BLOCKS |= {
    "mlstm_without_conv": functools.partial(BLOCKS["mlstm"], conv_kernel_size=0),
    "slstm_without_conv": functools.partial(BLOCKS["slstm"], conv_kernel_size=0),
    "large_slstm": functools.partial(BLOCKS["large"], slstm=True),
}
STACKS = {
    "stack": functools.partial(XLSTMBlockStack, 2, num_heads=2, slstm_at=[1], chunk_size=2),
    "large_stack": functools.partial(
        XLSTMBlockStack, 2, num_heads=2, slstm_at=[0], block_style="large", ffn_round_up_to=4
    ),
}
each_kind = pytest.mark.parametrize("kind", BLOCKS | STACKS)
each_stack = pytest.mark.parametrize("kind", STACKS)

MASK = np.array([[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], bool)
RESET = np.array([[0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 1, 0]], bool)


@functools.cache
def new(kind):
    """A block or stack that is only read. Each use has the same noisy weights."""
    layer = (BLOCKS | STACKS)[kind]()
    layer.build((None, None, D))
    return noisy(layer, scale=0.5)


@functools.cache
def some_state(kind):
    """A state in the middle of a sequence."""
    return new(kind)(random(B, 3, D, seed=9), return_state=True)[1]


def dense(x, layer):
    kernel, *bias = (numpy(w).astype("float64") for w in layer.weights)
    return x @ kernel + (bias[0] if bias else 0)


def headwise(x, layer):
    (kernel,) = (numpy(w).astype("float64") for w in layer.weights)  # (NH, DH, DH)
    heads = x.reshape(*x.shape[:2], *kernel.shape[:2])
    return np.stack([heads[:, :, n] @ kernel[n] for n in range(len(kernel))], 2).reshape(x.shape)


def norm(x, layer, centre=True):
    if centre:
        x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 1e-6)
    zero_centered = isinstance(layer, ZeroCenteredLayerNorm) or getattr(layer, "zero_centered", 0)
    return x * (numpy(layer.weights[0]) + (1 if zero_centered else 0))


def silu(x):
    return x * oracle.sigmoid(x)


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2


def split_heads(x, NH=2):
    return x.reshape(*x.shape[:2], NH, -1)


def numpy_mlstm_block(block, x, state, **flags):
    conv_state, *state = state
    u, z = np.split(dense(norm(x, block.norm), block.up), 2, axis=-1)
    kernel, bias = numpy(block.conv.weights)
    c, conv_state = oracle.causal_conv1d(u, kernel, bias, initial_state=conv_state, **flags)
    c = silu(c)
    q, k, v = headwise(c, block.query), headwise(c, block.key), headwise(u, block.value)
    qkv = np.concatenate([q, k, v], axis=-1)
    i, f = dense(qkv, block.input_gate), dense(qkv, block.forget_gate)
    q, k, v = map(split_heads, (q, k, v))
    h, state = oracle.mlstm(q, k, v, i, f, initial_state=state, **flags)
    h = norm(h, block.head_norm).reshape(u.shape)
    y = x + dense((h + numpy(block.skip) * c) * silu(z), block.down)
    return y, [conv_state, *state]


def numpy_slstm_block(block, x, state, **flags):
    conv_state, *state = state
    y = norm(x, block.norm)
    kernel, bias = numpy(block.conv.weights)
    c, conv_state = oracle.causal_conv1d(y, kernel, bias, initial_state=conv_state, **flags)
    c = silu(c)
    gates = [headwise(c, block.input_gate), headwise(c, block.forget_gate)]
    gates += [headwise(y, block.cell_input), headwise(y, block.output_gate)]
    gates = np.stack([split_heads(g) for g in gates], axis=2)
    R, bias = numpy(block.recurrence.weights)
    h, state = oracle.slstm(gates, R, bias, initial_state=state, **flags)
    x = x + norm(h, block.head_norm).reshape(x.shape)
    y = norm(x, block.ffn_norm)
    y = dense(gelu(dense(y, block.ffn.gate)) * dense(y, block.ffn.up), block.ffn.down)
    return x + y, [conv_state, *state]


def numpy_large_block(block, x, state, **flags):
    cell, y = block.mixer.cell, norm(x, block.norm, centre=False)
    q, k, v = (split_heads(dense(y, part)) for part in (cell.query, cell.key, cell.value))
    i, f = (15 * np.tanh(dense(y, gate) / 15) for gate in (cell.input_gate, cell.forget_gate))
    state = [
        s.reshape(shape)
        for s, shape in zip(state, [(-1, 2, 2, 4), (-1, 2, 2), (-1, 2)], strict=True)
    ]
    h, state = oracle.mlstm(q, k, v, i, f, initial_state=state, **flags)
    h = oracle.sigmoid(dense(y, cell.output_gate)) * norm(h, cell.norm).reshape(x.shape)
    x = x + dense(h, cell.output_projection)
    y = norm(x, block.ffn_norm, centre=False)
    y = dense(silu(dense(y, block.ffn.gate)) * dense(y, block.ffn.up), block.ffn.down)
    return x + y, [s.reshape(len(s), -1) for s in state]


NUMPY = {"mlstm": numpy_mlstm_block, "slstm": numpy_slstm_block, "large": numpy_large_block}


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("flags", [{}, dict(mask=MASK, reset=RESET)], ids=["", "flags"])
def test_numbers_are_those_of_the_equations(kind, flags):
    block, x = new(kind), random(B, S, D)
    state = some_state(kind)
    y, new_state = block(x, initial_state=state, return_state=True, **flags)
    wanted, wanted_state = NUMPY[kind](block, x.astype("float64"), numpy(state), **flags)
    happens = flags.get("mask", np.ones((B, S), bool))
    assert_close(numpy(y)[happens], wanted[happens], rtol=1e-4)
    assert_close(new_state, wanted_state, rtol=1e-4)


def test_without_convolution_its_place_is_taken_by_its_input():
    """A convolution whose kernel is 1 at the step itself, less SiLU, is none."""
    for kind in ("mlstm_without_conv", "slstm_without_conv"):
        names = [w.path for w in new(kind).weights]
        assert not any("conv" in name for name in names)
        assert len(names) == len(new(kind.split("_")[0]).weights) - 2
        zero = new(kind).get_initial_state(3)
        assert len(zero) == len(new(kind.split("_")[0]).get_initial_state(3)) - 1


@each_kind
def test_pieces_equal_the_whole(kind):
    """Masks, resets and the state at the start included."""
    layer, x = new(kind), random(B, S, D)
    whole, last = layer(
        x, initial_state=some_state(kind), mask=MASK, reset=RESET, return_state=True
    )
    pieces, state = [], some_state(kind)
    for part in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6)):
        y, state = layer(
            x[:, part],
            initial_state=state,
            mask=MASK[:, part],
            reset=RESET[:, part],
            return_state=True,
        )
        pieces.append(numpy(y))
    assert_close(np.concatenate(pieces, axis=1)[MASK], numpy(whole)[MASK])
    tree.assert_same_structure(state, last)
    assert_close(state, last)
    assert {keras.backend.standardize_dtype(s.dtype) for s in tree.flatten(state)} == {"float32"}


@each_kind
@pytest.mark.parametrize(
    "mask",
    [[[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]], [[1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 0]]],
    ids=["left", "right"],
)
def test_padding_changes_nothing(kind, mask):
    """Of each row 3 steps happen."""
    layer, x, mask = new(kind), random(B, S, D), np.array(mask, bool)
    y, state = layer(x, mask=mask, return_state=True)
    alone, alone_state = layer(x[mask].reshape(B, 3, D), return_state=True)
    assert_close(numpy(y)[mask], numpy(alone).reshape(-1, D))
    assert_close(state, alone_state)
    other = np.where(mask[..., None], x, 100 * random(B, S, D, seed=5))
    assert_close(numpy(layer(other, mask=mask))[mask], numpy(y)[mask], rtol=0, atol=0)
    nothing = np.zeros((B, S), bool)
    y, after = layer(x, initial_state=state, mask=nothing, reset=~nothing, return_state=True)
    assert_close(after, state, rtol=0, atol=0)


@each_kind
def test_packed_documents_equal_separate_ones(kind):
    """Documents of 3 and 3 steps in the first row, of 1, 3 and 2 in the second."""
    layer, x = new(kind), random(B, S, D)
    reset = np.array([[1, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0]], bool)
    y, state = layer(x, initial_state=some_state(kind), reset=reset, return_state=True)
    first, _ = numpy(layer(np.stack([x[0, :3], x[1, 1:4]]), return_state=True))
    last, last_state = layer(np.stack([x[0, 3:], x[0, :3]]), return_state=True)
    assert_close(numpy(y)[0], np.concatenate([first[0], numpy(last)[0]]))
    assert_close(numpy(y)[1, 1:4], first[1])
    assert_close([s[0] for s in tree.flatten(state)], [s[0] for s in tree.flatten(last_state)])


@pytest.mark.parametrize("kind", ["mlstm", "stack"])
def test_the_mask_that_comes_with_x_counts_also_beside_a_state(kind):
    layer, x, state = new(kind), random(B, S, D), some_state(kind)
    masked = keras.layers.Masking()(np.where(MASK[..., None], x, 0).astype("float32"))
    for beside in (dict(initial_state=state), dict(reset=RESET), {}):
        wanted = layer(x, mask=MASK, **beside)
        y = layer(masked, **beside)
        assert_close(numpy(y)[MASK], numpy(wanted)[MASK])
        np.testing.assert_array_equal(numpy(y._keras_mask) > 0, MASK)  # handed on


@each_stack
def test_a_stack_learns_in_mixed_precision(kind):
    """To repeat what came a step before, among masked steps and resets. Compiled."""
    keras.utils.set_random_seed(0)
    x, stack = keras.Input((S, D)), STACKS[kind](dtype="mixed_bfloat16")
    mask, reset = keras.Input((S,), dtype="bool"), keras.Input((S,), dtype="bool")
    y = stack(x, mask=mask, reset=reset)
    model = keras.Model([x, mask, reset], keras.layers.Dense(D, dtype="float32")(y))
    model.compile(keras.optimizers.Adam(0.02), "mse", jit_compile="auto")
    rng, before = np.random.default_rng(3), numpy(model.trainable_variables)
    inputs = random(16, S, D)
    targets = np.concatenate([np.zeros((16, 1, D), "float32"), inputs[:, :-1]], axis=1)
    flags = [rng.random((16, S)) < 0.9, rng.random((16, S)) < 0.1]
    flags[0][0] = False  # a row in which nothing happens
    losses = model.fit([inputs, *flags], targets, batch_size=16, epochs=15, verbose=0).history
    assert losses["loss"][-1] < 0.8 * losses["loss"][0]
    for w, old in zip(model.trainable_variables, before, strict=True):
        assert np.isfinite(numpy(w)).all() and np.abs(numpy(w) - old).max() > 0, w.path


@each_stack
def test_low_precision_stays_near_float32(kind):
    policy = keras.DTypePolicy({"stack": "mixed_float16", "large_stack": "bfloat16"}[kind])
    x, stack = keras.Input((S, D)), STACKS[kind](dtype=policy)
    y, state = stack(x, return_state=True)
    assert y.dtype == policy.compute_dtype
    assert {s.dtype for s in tree.flatten(state)} == {"float32"}
    noisy(stack, scale=0.5)
    inputs = random(B, S, D)
    got = numpy(keras.Model(x, y).predict_on_batch(inputs))
    # Outputs have a deviation of 0.5; the roundings of two blocks add up.
    assert np.abs(got - numpy(new(kind)(inputs))).max() < 0.15


@each_stack
def test_a_model_of_a_stack_saves_and_loads(kind, tmp_path):
    tokens = keras.Input((None,), dtype="int32")
    stack = STACKS[kind]()
    model = keras.Model(tokens, stack(keras.layers.Embedding(5, D, mask_zero=True)(tokens)))
    noisy(stack)
    inputs = np.array([[1, 2, 3, 0, 4, 0], [0, 3, 3, 1, 0, 2]], "int32")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(again(inputs), model(inputs), rtol=0, atol=0)
    assert_close(again.get_weights(), model.get_weights(), rtol=0, atol=0)
    assert len({w.path for w in model.weights}) == len(model.weights)


@each_stack
def test_a_stack_streams_in_a_functional_model(kind):
    """States are inputs and outputs of the model."""
    stack, x = new(kind), keras.Input((None, D))
    zero = stack.get_initial_state(2)
    states = tree.map_structure(lambda s: keras.Input(s.shape[1:]), zero)
    y, new_states = stack(x, initial_state=states, return_state=True)
    assert tree.map_structure(lambda s: s.shape[1:], new_states) == tree.map_structure(
        lambda s: tuple(s.shape[1:]), zero
    )
    model, inputs = keras.Model([x, states], [y, new_states]), random(B, S, D)
    first, middle = model.predict_on_batch([inputs[:, :3], numpy(zero)])
    second, last = model.predict_on_batch([inputs[:, 3:], middle])
    pieces = [np.concatenate([numpy(first), numpy(second)], axis=1), last]
    assert_close(pieces, stack(inputs, return_state=True))


def test_a_stack_is_its_blocks_and_its_norm():
    for kind, (first, second), last in (
        ("stack", (MLSTMBlock, SLSTMBlock), ZeroCenteredLayerNorm),
        ("large_stack", (XLSTMLargeBlock, XLSTMLargeBlock), keras.layers.RMSNormalization),
    ):
        stack, x = new(kind), random(B, S, D)
        assert isinstance(stack.blocks[0], first) and isinstance(stack.blocks[1], second)
        assert isinstance(stack.norm, last)
        assert [block.block_index for block in stack.blocks] == list(range(stack.num_blocks))
        assert {block.num_blocks for block in stack.blocks} == {stack.num_blocks}
        y = x
        for block in stack.blocks:
            y = block(y)
        assert_close(stack.norm(y), stack(x))
        zero = stack.get_initial_state(2)
        assert [len(s) for s in zero] == [len(block.get_initial_state(2)) for block in stack.blocks]
        assert all(np.all(numpy(s) == 0) and s.shape[0] == 2 for s in tree.flatten(zero))
        assert_close(stack(x, initial_state=zero), stack(x))
    assert [block.slstm for block in new("large_stack").blocks] == [True, False]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_blocks=0), "`num_blocks` must be a positive integer"),
        (
            dict(num_blocks=2, slstm_at=[2]),
            r"`slstm_at` must be a list.*=\[2\], num_blocks=2",
        ),
        (dict(num_blocks=2, slstm_at=[-1]), "`slstm_at` must be a list"),
        (dict(num_blocks=2, slstm_at=[1, 1]), "`slstm_at` must be a list"),
        (dict(num_blocks=2, block_style="small"), "`block_style` must be one of .*'small'"),
        (dict(num_blocks=2, num_heads=0), "`num_heads` must be a positive integer"),
    ],
    ids=str,
)
def test_stacks_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        XLSTMBlockStack(**options)


def test_blocks_that_cannot_be():
    for block in (MLSTMBlock, SLSTMBlock, XLSTMLargeBlock):
        with pytest.raises(ValueError, match="`block_index` must.*block_index=2, num_blocks=2"):
            block(num_blocks=2, block_index=2)
        with pytest.raises(ValueError, match="`num_heads` must divide"):
            block(num_heads=3).build((None, None, 8))
    with pytest.raises(ValueError, match="`qkv_block_size` must divide"):
        MLSTMBlock(num_heads=2, qkv_block_size=5).build((None, None, 8))
    with pytest.raises(ValueError, match="`num_heads` must divide"):
        XLSTMLargeBlock(num_heads=4, qk_dim_factor=0.25).build((None, None, 8))
    for block in (MLSTMBlock, SLSTMBlock):
        with pytest.raises(ValueError, match="`conv_kernel_size` must be"):
            block(conv_kernel_size=-1)


def test_states_that_cannot_be():
    stack, x = new("stack"), random(B, S, D)
    with pytest.raises(ValueError, match="`initial_state` must be a list .* 1 of them, for 2"):
        stack(x, initial_state=stack.get_initial_state(B)[:1])
    for kind in BLOCKS:
        block = new(kind)
        with pytest.raises(ValueError, match="Received: "):
            block(x, initial_state=block.get_initial_state(3))
        with pytest.raises(ValueError, match="Received: "):
            block(x, initial_state=block.get_initial_state(2)[1:])
