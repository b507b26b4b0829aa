"""What blocks are made of: convolution, headwise projections, norm, feed-forward network."""

import inspect
import json
import math

import keras
import numpy as np
import oracle
import pytest
from keras import ops
from layer_cases import assert_close, noisy, numpy, random, run_layer_test

from keras_xlstm.layers import (
    MLSTM,
    SLSTM,
    CausalConv1D,
    GatedFeedForward,
    HeadwiseDense,
    Linspace,
    MLSTMBlock,
    MultiHeadNorm,
    PowerlawForgetBias,
    SLSTMBlock,
    SLSTMRecurrence,
    XLSTMBlockStack,
    XLSTMLargeBlock,
    ZeroCenteredLayerNorm,
)

B, S, D = 2, 6, 8


def built(layer, *shape):
    layer.build(shape)
    return layer


@pytest.mark.parametrize(
    "layer, options, shape, weights",
    [
        (CausalConv1D, dict(kernel_size=3), (B, S, D), 2),
        (HeadwiseDense, dict(num_heads=2, use_bias=True), (B, S, D), 2),
        (MultiHeadNorm, dict(zero_centered=True), (B, S, 2, 4), 1),
        (ZeroCenteredLayerNorm, dict(), (B, S, D), 1),
        (GatedFeedForward, dict(intermediate_dim=5, activation="gelu"), (B, S, D), 3),
        (MLSTMBlock, dict(num_heads=2, proj_round_up_to=4, chunk_size=2), (B, S, D), 14),
        (SLSTMBlock, dict(num_heads=2, ffn_round_up_to=4), (B, S, D), 14),
        (XLSTMLargeBlock, dict(num_heads=2, ffn_round_up_to=4, chunk_size=2), (B, S, D), 15),
    ],
)
def test_passes_keras_own_layer_test(layer, options, shape, weights):
    run_layer_test(
        layer,
        init_kwargs=options,
        input_shape=shape,
        expected_output_shape=shape,
        expected_output_dtype="float32",
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        supports_masking=True,
    )


OPTIONS = {
    CausalConv1D: dict(kernel_size=3, use_bias=False),
    HeadwiseDense: dict(num_heads=2, use_bias=True, kernel_initializer="he_normal"),
    MultiHeadNorm: dict(epsilon=0.5, zero_centered=True),
    ZeroCenteredLayerNorm: dict(epsilon=0.5),
    GatedFeedForward: dict(intermediate_dim=5, activation="relu", num_blocks=3),
    Linspace: dict(start=1.0, stop=2.0),
    PowerlawForgetBias: dict(exponent=0.7),
    SLSTMRecurrence: dict(
        recurrent_initializer="ones", bias_initializer="zeros", recurrent_regularizer="l1",
        bias_regularizer="l2", recurrent_constraint="non_neg", bias_constraint="max_norm",
        kernel="scan",
    ),
}  # fmt: skip
BLOCK = dict(num_heads=2, norm_epsilon=0.1, num_blocks=5, block_index=3, kernel="some")
OPTIONS[SLSTMBlock] = BLOCK | dict(conv_kernel_size=3, ffn_dim_factor=2.0, ffn_round_up_to=2)
OPTIONS[MLSTMBlock] = BLOCK | dict(
    conv_kernel_size=3, qkv_block_size=2, proj_factor=3.0, proj_round_up_to=2, chunk_size=7
)
LARGE = dict(
    qk_dim_factor=1.0, v_dim_factor=2.0, ffn_dim_factor=2.0, ffn_round_up_to=2, gate_soft_cap=None,
    denominator_epsilon=0.1, chunk_size=7,
)  # fmt: skip
OPTIONS[XLSTMLargeBlock] = BLOCK | LARGE | dict(slstm=True)
OPTIONS[XLSTMBlockStack] = LARGE | dict(
    num_blocks=3, num_heads=2, slstm_at=[1], block_style="original", norm_epsilon=0.1,
    conv_kernel_size=3, kernel="some", mlstm_block={"qkv_block_size": 2},
    slstm_block={"conv_kernel_size": 0},
)  # fmt: skip


@pytest.mark.parametrize("cls", OPTIONS)
def test_every_option_survives_a_round_trip(cls):
    options, init = OPTIONS[cls], inspect.signature(cls.__init__).parameters
    assert set(options) == set(init) - {"self", "kwargs"}  # an option that is added is tested here
    # In original blocks, so that there are arguments of those; the other style has no others.
    assert all(options[name] != init[name].default for name in options if name != "block_style")
    config = cls(**options).get_config()
    for name, value in options.items():
        if isinstance(value, str) and name not in ("kernel", "block_style", "activation"):
            assert config[name] is not None
        else:
            assert config[name] == value, name
    once = json.loads(json.dumps(keras.saving.serialize_keras_object(cls(**options))))
    again = keras.saving.deserialize_keras_object(once)
    assert type(again) is cls
    config, again = config | {"name": ""}, again.get_config() | {"name": ""}
    assert json.dumps(again) == json.dumps(config)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_causal_conv(kernel_size, use_bias):
    layer = noisy(built(CausalConv1D(kernel_size, use_bias=use_bias), None, None, D))
    kernel, bias = [*(numpy(w).astype("float64") for w in layer.weights), None][:2]
    x, start = random(B, S, D), random(B, kernel_size - 1, D, seed=2)
    flags = dict(
        mask=np.array([[0, 1, 1, 0, 1, 1], [1, 0, 0, 1, 1, 0]], bool),
        reset=np.array([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]], bool),
    )
    for given in ({}, flags):
        y, state = layer(x, initial_state=start, return_state=True, **given)
        wanted = oracle.causal_conv1d(x, kernel, bias, initial_state=start, **given)
        assert_close([y, state], wanted)
        assert_close(layer(x, initial_state=start, **given), wanted[0])
    zeros = layer.get_initial_state(B)
    assert_close(layer(x, initial_state=zeros), layer(x))


def test_headwise_dense_mixes_only_inside_heads():
    layer = noisy(built(HeadwiseDense(4, use_bias=True), None, None, D))
    kernel, bias = numpy(layer.weights)
    x, whole = random(B, S, D), np.zeros((D, D))
    for head in range(4):
        block = slice(2 * head, 2 * head + 2)
        whole[block, block] = kernel[head]
    assert_close(layer(x), x @ whole + bias.reshape(-1))


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_multi_head_norm_is_reduced_in_float32(policy):
    layer = noisy(built(MultiHeadNorm(dtype=policy), None, None, 2, 4))
    x, scale = random(B, S, 2, 4) + 300.0, numpy(layer.scale)  # bfloat16 steps by 2 at 300
    wanted = x.astype("float64") - x.mean(axis=-1, keepdims=True, dtype="float64")
    wanted = wanted / np.sqrt(np.square(wanted).mean(axis=-1, keepdims=True) + 1e-6) * scale
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == keras.DTypePolicy(policy).compute_dtype
    digits = 1e-4 if policy == "float32" else 2.0**-7  # float32 holds 300 to 1e-5
    assert_close(y, wanted, rtol=digits, atol=digits)


def test_gated_feed_forward():
    x = random(B, S, D)
    for activation, function in (
        ("silu", lambda x: x / (1 + np.exp(-x))),
        ("gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2),
    ):
        layer = noisy(built(GatedFeedForward(5, activation=activation), None, None, D))
        gate, up, down = (numpy(part.kernel) for part in (layer.gate, layer.up, layer.down))
        assert_close(layer(x), (function(x @ gate) * (x @ up)) @ down)


def test_recurrence_takes_gates_and_shaped_states():
    layer = noisy(built(SLSTMRecurrence(), None, None, 4, 3, 2))
    gates, states = random(B, S, 4, 3, 2), [np.abs(random(B, 3, 2, seed=n)) for n in range(4)]
    R, bias = (numpy(w).astype("float64") for w in layer.weights)
    h, state = layer(gates, initial_state=states)
    assert_close(
        [h, *state], keras.tree.flatten(oracle.slstm(gates, R, bias, initial_state=states))
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CausalConv1D(0), "`kernel_size` must be a positive integer"),
        (lambda: HeadwiseDense(0), "`num_heads` must be a positive integer"),
        (lambda: built(HeadwiseDense(3), None, None, 8), "`num_heads` must divide `input width`"),
        (lambda: GatedFeedForward(0), "`intermediate_dim` must be a positive integer"),
    ],
)
def test_parts_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def deviation(weight):
    """Of many draws around 0: 64 x 64 of them or more leave an error of some 2 %."""
    w = numpy(weight)
    assert abs(w.mean()) < 0.1 * w.std()
    return w.std()


def close(x, wanted):
    return x == pytest.approx(wanted, rel=0.06)


WIDTH, BLOCKS = 64, 5


def test_the_large_block_starts_as_in_the_paper():
    block = XLSTMLargeBlock(num_heads=4, num_blocks=BLOCKS, block_index=2)
    built(block, None, None, WIDTH)
    cell, small = block.mixer.cell, math.sqrt(2 / (5 * WIDTH))
    for part in (cell.query, cell.key, cell.value, cell.output_gate, block.ffn.gate, block.ffn.up):
        assert close(deviation(part.kernel), small), part.name
        assert not part.use_bias
    for part in (cell.output_projection, block.ffn.down):
        assert close(deviation(part.kernel), 2 / (BLOCKS * math.sqrt(WIDTH))), part.name
        assert not part.use_bias
    for gate in (cell.input_gate, cell.forget_gate):
        assert np.all(numpy(gate.kernel) == 0)
    assert_close(cell.input_gate.bias, np.full(4, -10.0))
    assert_close(cell.forget_gate.bias, np.linspace(3, 6, 4))
    for norm in (block.norm, block.ffn_norm, cell.norm):
        assert np.all(numpy(norm.weights[0]) == 1) and len(norm.weights) == 1
    assert block.ffn.intermediate_dim == 192  # 2.667 x 64 = 170.7, up to a multiple of 64
    narrow = built(XLSTMLargeBlock(num_heads=4), None, None, 24)
    assert narrow.ffn.intermediate_dim == 64  # 2.667 x 24 = 64.008, down to 64 first
    assert (cell.key_dim, cell.value_dim) == (8, 16)


def test_the_original_blocks_start_as_in_the_paper():
    small, wang = math.sqrt(2 / (5 * WIDTH)), 2 / (BLOCKS * math.sqrt(WIDTH))
    block = built(MLSTMBlock(num_heads=4, num_blocks=BLOCKS, block_index=2), None, None, WIDTH)
    assert close(deviation(block.up.kernel), small) and close(deviation(block.down.kernel), wang)
    assert tuple(block.up.kernel.shape) == (WIDTH, 4 * WIDTH)
    for part in (block.query, block.key, block.value):
        assert tuple(part.weights[0].shape) == (2 * WIDTH // 4, 4, 4)
        assert deviation(part.weights[0]) == pytest.approx(small, rel=0.15)  # 512 draws: 3 %
    for gate in (block.input_gate, block.forget_gate):
        assert np.all(numpy(gate.kernel) == 0)
    assert_close(block.forget_gate.bias, np.linspace(3, 6, 4))
    assert np.abs(numpy(block.input_gate.bias)).max() < 0.5  # deviation 0.1
    assert np.all(numpy(block.skip) == 1)
    assert np.all(numpy(block.norm.gamma) == 0) and np.all(numpy(block.head_norm.scale) == 0)

    block = built(SLSTMBlock(num_heads=4, num_blocks=BLOCKS, block_index=2), None, None, WIDTH)
    assert close(deviation(block.ffn.up.kernel), small)
    assert close(deviation(block.ffn.gate.kernel), small)
    assert close(deviation(block.ffn.down.kernel), wang)
    assert block.ffn.intermediate_dim == 128  # 1.3 x 64 = 83.2, up to a multiple of 64
    assert np.all(numpy(block.recurrence.recurrent_kernel) == 0)


@pytest.mark.parametrize("index, exponent", [(0, 0.3), (2, 0.95), (4, 1.6)])
@pytest.mark.parametrize("large", [False, True])
def test_slstm_forget_bias_is_a_power_law(index, exponent, large):
    options = dict(num_heads=2, num_blocks=BLOCKS, block_index=index)
    block = XLSTMLargeBlock(slstm=True, **options) if large else SLSTMBlock(**options)
    built(block, None, None, 16)
    bias = numpy(block.mixer.cell.recurrence.bias if large else block.recurrence.bias)
    wanted = np.zeros((4, 2, 8))
    wanted[1] = 5 - 12 * (np.arange(8) / 7) ** exponent
    assert_close(bias, wanted)


def test_forget_bias_of_a_single_block_and_of_heads_of_width_one():
    single = built(SLSTMBlock(num_heads=2), None, None, 16).recurrence.bias
    assert_close(single, PowerlawForgetBias(0.3)((4, 2, 8)))
    layer = built(SLSTM(4, num_heads=2), None, None, 3)
    assert_close(layer.cell.recurrence.bias, PowerlawForgetBias()((4, 2, 2)))
    assert np.isfinite(numpy(PowerlawForgetBias()((4, 3, 1)))).all()
    assert_close(Linspace(3.0, 6.0)((1,)), np.array([3.0]))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MLSTM(16, num_heads=2, key_dim=8),
        lambda: MLSTM(16, num_heads=2, key_dim=8, kernel_initializer="he_normal"),
        lambda: MLSTM(16, num_heads=2, key_dim=8, kernel_initializer=keras.initializers.HeNormal()),
        lambda: XLSTMLargeBlock(num_heads=2, qk_dim_factor=1.0),
        lambda: MLSTMBlock(num_heads=2),
        lambda: SLSTMBlock(num_heads=2),
        lambda: CausalConv1D(4),
        lambda: XLSTMBlockStack(2, num_heads=2, block_style="large"),
    ],
)
def test_no_two_random_weights_start_alike(layer):
    """One initializer without a seed gives each of its callers the same numbers."""
    layer = built(layer(), None, None, 16)
    starts = [numpy(w).reshape(-1)[:16] for w in layer.weights]
    starts = [w for w in starts if len(set(w)) > 8]  # the random ones
    for n, first in enumerate(starts):
        for second in starts[:n]:
            assert np.abs(first[: len(second)] - second[: len(first)]).max() > 1e-3


def test_mlstm_layer_starts_as_documented():
    """Without arguments too, small-init for what reads the input and a shut input gate."""
    cell = built(MLSTM(64, num_heads=4), None, None, 128).cell
    for part in (cell.query, cell.key, cell.value, cell.output_gate):
        assert close(deviation(part.kernel), math.sqrt(2 / (5 * 128)))
    assert_close(cell.input_gate.bias, np.full(4, -10.0))
    assert_close(cell.forget_gate.bias, np.linspace(3, 6, 4))
    assert ops.all(ops.equal(cell.norm.scale, 1))
