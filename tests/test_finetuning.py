"""Adapters and quantization: what they reach, what they leave alone, saving, generation."""

import functools
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from keras.quantizers import AWQConfig, GPTQConfig

from keras_xlstm.layers import MLSTM, SLSTM, MLSTMBlock, XLSTMLargeBlock
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

TEXT = "the memory keeps what the gate lets in, and the gate reads what the memory keeps. " * 40
NEW_TEXT = "a river runs to the sea; the sea feeds the clouds, and clouds feed the river. " * 40
LENGTH = 48
STYLES = {
    "large": dict(slstm_at=[1]),
    "original": dict(slstm_at=[0], block_style="original", tie_embeddings=True),
}
each_style = pytest.mark.parametrize("style", STYLES)
# Perplexity after quantization over perplexity before, at most. GPTQ and AWQ: 4 bits.
LIMITS = {"int8": 1.02, "int4": 1.15, "float8": 1.1, "gptq": 1.15, "awq": 1.15}


def new_model(style="large", **sizes):
    keras.utils.set_random_seed(0)
    tokenizer = XLSTMTokenizer.byte_level()
    sizes = dict(num_layers=2, hidden_dim=32, num_heads=2, ffn_round_up_to=8) | sizes
    backbone = XLSTMBackbone(tokenizer.vocabulary_size(), **sizes, **STYLES[style])
    preprocessor = XLSTMCausalLMPreprocessor(
        tokenizer, LENGTH, add_start_token=False, add_end_token=False
    )
    lm = XLSTMCausalLM(backbone, preprocessor)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy", weighted_metrics=[])
    return lm


def windows(text, count=64):
    starts = np.random.default_rng(0).integers(len(text) - LENGTH, size=count)
    return [text[s : s + LENGTH + 1] for s in starts]


@functools.cache
def trained_weights(style):
    lm = new_model(style)
    lm.fit(windows(TEXT), batch_size=16, epochs=12, verbose=0)
    return [ops.convert_to_numpy(w) for w in lm.weights]


def trained_model(style="large"):
    lm = new_model(style)
    for w, value in zip(lm.weights, trained_weights(style), strict=True):
        w.assign(value)
    return lm


def perplexity(lm, text=TEXT):
    x, y, weights = lm.preprocessor(windows(text, 16))
    scores = lm.compute_loss(y=y, y_pred=lm(x), sample_weight=weights)
    return float(np.exp(ops.convert_to_numpy(scores)))


def logits(lm):
    tokens = np.random.default_rng(1).integers(2, 258, (2, 9)).astype("int32")
    return ops.convert_to_numpy(lm({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}))


def quantize(lm, mode):
    config = None
    if mode in ("gptq", "awq"):
        kind = GPTQConfig if mode == "gptq" else AWQConfig
        config = kind(
            dataset=windows(TEXT, 8),
            tokenizer=lm.preprocessor.tokenizer,
            num_samples=4,
            sequence_length=16,
            group_size=16,
        )
    with warnings.catch_warnings():
        # Keras warns of what it cannot quantize, and is asked for nothing of that kind.
        warnings.filterwarnings("error", message=".*quantize.*")
        lm.quantize(mode, config=config, filters=config and "value|up")
    lm.compile(sampler="greedy", weighted_metrics=[])


@pytest.mark.long_on_xla
def test_lora_learns_new_text_with_few_weights(tmp_path):
    lm = trained_model()
    before, total = perplexity(lm, NEW_TEXT), lm.count_params()
    lm.backbone.enable_lora(1)
    trained = sum(int(np.prod(w.shape)) for w in lm.trainable_variables)
    assert trained < 0.05 * total  # of a model this narrow; 2 % and less of a wider one
    lm.compile(optimizer=keras.optimizers.Adam(2e-2), sampler="greedy", weighted_metrics=[])
    lm.fit(windows(NEW_TEXT), batch_size=16, epochs=4, verbose=0)
    after = perplexity(lm, NEW_TEXT)
    assert after < 0.5 * before

    path = str(tmp_path / "adapter.lora.h5")
    lm.backbone.save_lora_weights(path)
    again = trained_model()
    again.backbone.load_lora_weights(path)
    np.testing.assert_allclose(logits(again), logits(lm), atol=1e-4)
    assert again.generate("a river", max_length=20) == lm.generate("a river", max_length=20)


def test_lora_trains_less_than_two_percent_of_the_quickstart_model():
    lm = new_model(num_layers=4, hidden_dim=128, num_heads=4, ffn_round_up_to=64)
    total = lm.count_params()
    lm.backbone.enable_lora(4)
    trained = sum(int(np.prod(w.shape)) for w in lm.trainable_variables)
    assert 0.01 * total < trained < 0.02 * total


@pytest.mark.long
def test_lora_learns_on_top_of_int8():
    lm = trained_model()
    quantize(lm, "int8")
    before = perplexity(lm, NEW_TEXT)
    lm.backbone.enable_lora(1)
    lm.compile(optimizer=keras.optimizers.Adam(2e-2), sampler="greedy", weighted_metrics=[])
    lm.fit(windows(NEW_TEXT), batch_size=16, epochs=2, verbose=0)
    assert perplexity(lm, NEW_TEXT) < 0.8 * before


@pytest.mark.long_on_xla  # where Keras compiles anew for each way
@pytest.mark.parametrize(
    "style, mode",
    [("large", mode) for mode in LIMITS]
    + [pytest.param("original", "int8", marks=pytest.mark.long)],
)
def test_quantized_models_keep_their_perplexity_save_load_and_generate(style, mode, tmp_path):
    lm = trained_model(style)
    before = perplexity(lm)
    quantize(lm, mode)
    assert perplexity(lm) < LIMITS[mode] * before

    kinds = {type(x).__name__ for x in lm._flatten_layers() if x.quantization_mode == mode}
    assert kinds == ({"Dense", "TokenEmbedding"} if mode in ("int8", "int4") else {"Dense"})
    untouched = [x for x in lm._flatten_layers() if x.name in ("input_gate", "forget_gate")]
    assert untouched and all(w.dtype == "float32" for x in untouched for w in x.weights)
    _, _, cache = lm.call_with_cache(np.array([[5, 6, 7]], "int32"), None)
    assert {keras.backend.standardize_dtype(x.dtype) for x in keras.tree.flatten(cache)} == {
        "float32"
    }

    expected, text = logits(lm), lm.generate("the mem", max_length=16)
    lm.save(tmp_path / "model.keras")
    lm.save_to_preset(tmp_path / "preset")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-5)
    loaded = XLSTMCausalLM.from_preset(str(tmp_path / "preset"))
    np.testing.assert_allclose(logits(loaded), expected, atol=1e-5)
    loaded.compile(sampler="greedy")
    assert loaded.generate("the mem", max_length=16) == text


def test_filters_choose_what_is_quantized():
    lm = new_model()
    lm.quantize("int8", filters="up|down")
    names = {x.name for x in lm._flatten_layers() if x.quantization_mode is not None}
    assert names == {"up", "down"}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: MLSTM(16, num_heads=2),
        lambda: SLSTM(16, num_heads=2),
        pytest.param(lambda: MLSTMBlock(num_heads=2), marks=pytest.mark.long_on_xla),
        pytest.param(
            lambda: XLSTMLargeBlock(num_heads=2, ffn_round_up_to=8), marks=pytest.mark.long_on_xla
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize.*")  # Keras tells which layers it leaves out
def test_layers_in_any_model_are_quantized_but_for_gates(layer, tmp_path):
    inputs = keras.Input((None, 16))
    model = keras.Model(inputs, layer()(inputs))
    x = np.random.default_rng(0).normal(size=(2, 5, 16)).astype("float32")
    before = ops.convert_to_numpy(model(x))
    model.quantize("int8")
    after = ops.convert_to_numpy(model(x))
    assert 0 < np.abs(after - before).max() < 0.05 * np.abs(before).max()
    quantized = {x.name for x in model._flatten_layers() if x.quantization_mode is not None}
    assert quantized and not quantized & {"input_gate", "forget_gate", "dense"}
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), after)
