"""The language model: its parts under KerasHub's own tests, training, scoring, the cache."""

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops, tree
from keras_hub.models import CausalLM
from keras_hub.src.tests.test_case import TestCase

from keras_xlstm.layers import MLSTM, SLSTM
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

TEXTS = ["the cat sat on the mat", "a dog", "", "the cat sat on the dog, and the dog ran"]
SMALL = dict(num_layers=2, hidden_dim=16, num_heads=2, ffn_round_up_to=8)
VARIANTS = {
    "large": dict(block_style="large"),
    "large_with_slstm": dict(block_style="large", slstm_at=[1], tie_embeddings=True, chunk_size=4),
    "original": dict(block_style="original", tie_embeddings=True),
    "original_with_slstm": dict(block_style="original", slstm_at=[0], chunk_size=4),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_style = pytest.mark.parametrize("variant", ["large_with_slstm", "original_with_slstm"])


def new_model(variant, sequence_length=24, **kwargs):
    keras.utils.set_random_seed(0)
    tokenizer = XLSTMTokenizer.byte_level()
    backbone = XLSTMBackbone(tokenizer.vocabulary_size(), **SMALL, **VARIANTS[variant], **kwargs)
    return XLSTMCausalLM(backbone, XLSTMCausalLMPreprocessor(tokenizer, sequence_length))


@functools.cache
def language_model(variant):
    """A model that is only read. Its weights are noisy, so that every part of it matters."""
    model = new_model(variant)
    noise = np.random.default_rng(0)
    for w in model.trainable_variables:
        w.assign(w + 0.2 * noise.normal(size=w.shape))
    return model


def random_tokens(B, S):
    return np.random.default_rng(1).integers(2, 258, (B, S)).astype("int32")


def forward(model, token_ids, padding_mask=None):
    if padding_mask is None:
        padding_mask = np.ones_like(token_ids)
    return numpy(model({"token_ids": token_ids, "padding_mask": padding_mask}))


def numpy(x):
    return ops.convert_to_numpy(x)


def assert_near(got, expected, rtol=1e-5):
    """Relative to the largest value: float32 noise of sums does not shrink with their result."""
    expected = numpy(expected)
    np.testing.assert_allclose(numpy(got), expected, rtol=0, atol=rtol * np.abs(expected).max())


class KerasHubTest(TestCase):
    """KerasHub's tests of its own models."""

    def _backbone(self, variant):
        self.run_backbone_test(
            XLSTMBackbone,
            dict(vocabulary_size=20, **SMALL, **VARIANTS[variant]),
            {
                "token_ids": np.ones((2, 5), "int32"),
                "padding_mask": np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], "int32"),
            },
            expected_output_shape=(2, 5, 16),
            # It wants one compute dtype in all layers; the gates' are float32 by design.
            run_mixed_precision_check=False,
        )

    def test_backbone_large(self):
        self._backbone("large_with_slstm")

    def test_backbone_original(self):
        self._backbone("original_with_slstm")

    def _task(self, variant):
        model = new_model(variant, sequence_length=8)
        self.run_task_test(
            XLSTMCausalLM,
            dict(backbone=model.backbone, preprocessor=model.preprocessor, logit_soft_cap=20.0),
            train_data=(["airplane at airport", "airplane at airport"],),
            expected_output_shape=(2, 8, 258),
        )

    @pytest.mark.long_on_xla
    def test_task_large(self):
        self._task("large_with_slstm")

    @pytest.mark.long  # and that of large blocks always
    def test_task_original(self):
        self._task("original_with_slstm")

    def test_tokenizer(self):
        vocabulary = {c: i for i, c in enumerate(["!", "a", "i", "r", "Ġ", "Ġa", "ai", "air"])}
        self.run_preprocessing_layer_test(
            XLSTMTokenizer,
            dict(
                vocabulary=vocabulary | {"<|endoftext|>": 8},
                merges=["Ġ a", "a i", "ai r"],
            ),
            input_data=["air air!<|endoftext|>", " air"],
            expected_output=[[7, 5, 2, 3, 0, 8], [5, 2, 3]],
        )

    def test_preprocessor(self):
        self.init_kwargs = dict(tokenizer=XLSTMTokenizer.byte_level(), sequence_length=6)
        a, b = 2 + ord("a"), 2 + ord("b")
        self.run_preprocessor_test(
            XLSTMCausalLMPreprocessor,
            self.init_kwargs,
            input_data=["ab", "a"],
            expected_output=(
                {
                    "token_ids": [[0, a, b, 0, 1, 1], [0, a, 0, 1, 1, 1]],
                    "padding_mask": [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
                },
                [[a, b, 0, 1, 1, 1], [a, 0, 1, 1, 1, 1]],
                [[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
            ),
        )


def test_importing_models_without_keras_hub_says_what_to_install():
    code = """
import sys
sys.modules["keras_hub"] = None
import keras_xlstm
try:
    import keras_xlstm.models
except ImportError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert lines == ['`keras_xlstm.models` needs KerasHub: pip install "keras-xlstm[hub]"']


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(vocabulary_size=0), "`vocabulary_size` must be a positive integer"),
        (dict(num_layers=2.5), "`num_layers` must be a positive integer"),
        (dict(hidden_dim=-4), "`hidden_dim` must be a positive integer"),
        (dict(num_heads=0), "`num_heads` must be a positive integer"),
        (dict(chunk_size=0), "`chunk_size` must be a positive integer"),
        (dict(ffn_dim_factor=0), "`ffn_dim_factor` must be a positive number"),
        (dict(gate_soft_cap=-1.0), "`gate_soft_cap` must be a positive number"),
        (dict(num_heads=3), "width of a head, must be a whole number.*16 . 0.5. / 3"),
        (dict(v_dim_factor=0.2), "v_dim_factor.*whole number.*nearest fit: v_dim_factor=0.25"),
        (dict(num_heads=3, block_style="original"), "`num_heads` must divide"),
        (dict(slstm_at=[2]), "`slstm_at` must be a list of different indices"),
        (dict(slstm_at=[0, 0]), "`slstm_at` must be a list of different indices"),
        (dict(block_style="small"), "`block_style` must be one of"),
    ],
)
def test_backbone_names_the_argument_that_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        XLSTMBackbone(**(dict(vocabulary_size=20) | SMALL | arguments))


def test_config_is_complete():
    arguments = dict(
        vocabulary_size=20,
        num_layers=3,
        hidden_dim=16,
        num_heads=2,
        qk_dim_factor=1.0,
        v_dim_factor=2.0,
        ffn_dim_factor=1.5,
        ffn_round_up_to=4,
        gate_soft_cap=10.0,
        norm_epsilon=1e-5,
        denominator_epsilon=1e-4,
        slstm_at=[0, 2],
        block_style="large",
        mlstm_block={},
        slstm_block={},
        tie_embeddings=True,
        chunk_size=8,
        packed=True,
    )
    config = XLSTMBackbone(**arguments | dict(slstm_at=(0, 2))).get_config()
    assert {name: config[name] for name in arguments} == arguments
    assert set(config) == set(arguments) | {"name", "trainable", "dtype"}


def test_tied_embeddings_save_a_head():
    tied, untied = new_model("large_with_slstm"), new_model("large")
    assert len(tied.backbone.token_embedding.weights) == 1
    assert len(untied.backbone.token_embedding.weights) == 2
    std = numpy(untied.backbone.token_embedding.embeddings).std()
    assert std == pytest.approx((2 / (5 * 16)) ** 0.5, rel=0.05)


@each_variant
def test_logits_are_float32_and_capped(variant):
    model = language_model(variant)
    hidden = model.backbone({"token_ids": random_tokens(2, 7), "padding_mask": np.ones((2, 7))})
    raw = numpy(model.backbone.token_embedding(100 * hidden, reverse=True))
    capped = numpy(model._logits(100 * hidden))
    assert np.abs(raw).max() > 30
    assert_near(capped, 30 * np.tanh(raw / 30))
    uncapped = XLSTMCausalLM(model.backbone, logit_soft_cap=None)
    assert_near(uncapped._logits(100 * hidden), raw)


@each_variant
def test_padding_on_any_side_changes_nothing(variant):
    model, tokens = language_model(variant), random_tokens(2, 9)
    alone = forward(model, tokens[:1, :5])
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1] * 9])
    padded = tokens.copy()
    padded[0, mask[0] == 1] = tokens[0, :5]
    got = forward(model, padded, mask)
    assert_near(got[0, mask[0] == 1], alone[0])
    assert_near(got[1], forward(model, tokens)[1])


@each_style
def test_cache_goes_on_in_pieces_of_any_length(variant):
    model, tokens = language_model(variant), random_tokens(2, 17)
    rng = np.random.default_rng(2)
    mask = rng.random(tokens.shape) < 0.7
    whole, hidden, last = model.call_with_cache(tokens, None, mask)
    assert_near(whole, forward(model, tokens, mask))
    for cuts in ([1, 2], np.sort(rng.choice(np.arange(1, 17), 2, replace=False))):
        cache, logits, states = None, [], []
        for piece, m in zip(np.split(tokens, cuts, 1), np.split(mask, cuts, 1), strict=True):
            y, h, cache = model.call_with_cache(piece, cache, m)
            logits.append(numpy(y))
            states.append(numpy(h))
        assert_near(np.concatenate(logits, 1)[mask], numpy(whole)[mask])
        assert_near(np.concatenate(states, 1)[mask], numpy(hidden)[mask])
        tree.map_structure(assert_near, cache, last)


def test_cache_does_not_grow():
    model = language_model("original_with_slstm")
    _, _, short = model.call_with_cache(random_tokens(2, 1), None)
    _, _, long = model.call_with_cache(random_tokens(2, 17), None)
    shapes = [tuple(x.shape) for x in tree.flatten(short)]
    assert shapes == [tuple(x.shape) for x in tree.flatten(long)]
    initial = model.backbone.stack.get_initial_state(2)
    tree.assert_same_structure(initial, short)
    assert shapes == [tuple(x.shape) for x in tree.flatten(initial)]


@each_variant
def test_score(variant):
    model, tokens = language_model(variant), random_tokens(2, 9)
    mask = np.array([[1] * 9, [1] * 6 + [0] * 3])
    logits = forward(model, tokens, mask)
    assert_near(model.score(tokens, mask), logits)
    assert_near(model.score(tokens), forward(model, tokens))
    targets = np.roll(tokens, -1, axis=1)
    loss = numpy(model.score(tokens, mask, scoring_mode="loss", target_ids=targets))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert_near(loss, -np.take_along_axis(log_p, targets[..., None], -1)[..., 0])

    seen = []

    def intercept(x, i):
        seen.append(i)
        return x if i else ops.zeros_like(x)  # all positions are alike behind block 0

    changed = numpy(model.score(tokens, layer_intercept_fn=intercept))
    assert seen == [-1, 0, 1]
    assert_near(changed[0], changed[1])
    with pytest.raises(ValueError, match=r"needs `target_ids`"):
        model.score(tokens, scoring_mode="loss")
    with pytest.raises(ValueError, match=r"must be 'logits' or 'loss'.*'perplexity'"):
        model.score(tokens, scoring_mode="perplexity")


@each_style
def test_fit_on_strings_lowers_the_loss(variant):
    model = new_model(variant)
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    before = model.evaluate(TEXTS, verbose=0)[0]
    model.fit(TEXTS, batch_size=2, epochs=5, verbose=0)
    assert model.evaluate(TEXTS, verbose=0)[0] < 0.8 * before


def test_fit_on_token_arrays_lowers_the_loss():
    model = new_model("large_with_slstm")
    model.preprocessor = None
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    tokens = np.tile(np.arange(2, 12, dtype="int32"), (4, 2))
    x = {"token_ids": tokens[:, :-1], "padding_mask": np.ones_like(tokens[:, :-1])}
    first = model.fit(x, tokens[:, 1:], batch_size=2, epochs=6, verbose=0).history["loss"]
    assert first[-1] < 0.8 * first[0]


@each_style
def test_mixed_bfloat16_trains_and_keeps_the_state_in_float32(variant):
    model = new_model(variant, dtype="mixed_bfloat16")
    loss = model.fit(TEXTS, batch_size=2, verbose=0).history["loss"]
    assert np.isfinite(loss).all()
    logits, hidden, cache = model.call_with_cache(random_tokens(2, 3), None)
    dtype = keras.backend.standardize_dtype
    assert (dtype(logits.dtype), dtype(hidden.dtype)) == ("float32", "bfloat16")
    assert {dtype(x.dtype) for x in tree.flatten(cache)} == {"float32"}
    assert {w.dtype for w in model.trainable_variables} == {"float32"}


@pytest.mark.parametrize(
    "variant, names",
    [
        ("large", ["query", "key", "value", "output_gate", "output"]),
        ("large_with_slstm", ["query", "key", "value", "output_gate", "output", "projection"]),
        ("original", ["up", "down"]),
    ],
)
def test_lora_adapts_the_layers_around_the_memories(variant, names):
    backbone = language_model(variant).backbone
    assert backbone.default_lora_layer_names() == names


@each_style
def test_lora_trains_adapters_only(variant):
    model, tokens = new_model(variant), random_tokens(1, 5)
    before = forward(model, tokens)
    model.backbone.enable_lora(2)
    assert_near(forward(model, tokens), before)
    assert {w.name for w in model.trainable_variables} == {"lora_kernel_a", "lora_kernel_b"}
    frozen = [numpy(w) for w in model.non_trainable_variables]
    model.compile(optimizer=keras.optimizers.Adam(1e-2))
    loss = model.fit(TEXTS, batch_size=2, epochs=5, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    for w, value in zip(model.non_trainable_variables, frozen, strict=True):
        np.testing.assert_array_equal(numpy(w), value)


UNICODE = [
    "plain, with numbers 1234567 and   spaces \t\n\n\r\n",
    "grüße, 日本語, العربية, 👩‍👩‍👧, \u0000\u00a0\u3000\ufeff६",
    "a special <|endoftext|> and <|padding|> inside",
    "",
]


def test_byte_level_tokenizer_returns_every_text_as_it_was():
    tokenizer = XLSTMTokenizer.byte_level()
    assert tokenizer.vocabulary_size() == 258
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    ids = tokenizer(UNICODE)
    assert tokenizer.detokenize(ids) == UNICODE
    assert [tokenizer.detokenize(tokenizer(text)) for text in UNICODE] == UNICODE
    assert list(ids[0]) == [2 + byte for byte in UNICODE[0].encode()]


def test_tokenizer_splits_words_by_the_rules_of_gpt2():
    # The digits are one word: `12` and `34` may merge, which Llama 3's groups of three forbid.
    vocabulary = {t: i for i, t in enumerate(["<|endoftext|>", *"1234", "12", "34", "1234"])}
    tokenizer = XLSTMTokenizer(vocabulary, ["1 2", "3 4", "12 34"])
    assert list(tokenizer("1234")) == [7]
    assert tokenizer.pad_token_id == tokenizer.end_token_id == 0


def test_tokenizer_takes_an_empty_list_of_merges():
    assert list(XLSTMTokenizer({"<|endoftext|>": 0, "a": 1}, [])("aa")) == [1, 1]


@pytest.mark.parametrize("start", [True, False])
def test_prompts_start_as_texts_do(start):
    preprocessor = XLSTMCausalLMPreprocessor(
        XLSTMTokenizer.byte_level(), sequence_length=4, add_start_token=start
    )
    text = numpy(preprocessor(["ab"])[0]["token_ids"])[0]
    prompt = preprocessor.generate_preprocess(["ab"])
    length = 2 + start
    np.testing.assert_array_equal(numpy(prompt["token_ids"])[0, :length], text[:length])
    np.testing.assert_array_equal(numpy(prompt["padding_mask"])[0], np.arange(4) < length)
    assert preprocessor.generate_postprocess(prompt) == ["ab"]


def test_model_is_a_keras_hub_causal_lm():
    assert issubclass(XLSTMCausalLM, CausalLM)
    assert keras.saving.get_registered_object("keras_xlstm>XLSTMCausalLM") is XLSTMCausalLM


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the others trace symbols")
@pytest.mark.parametrize("style", ["large", "original"])
def test_a_model_is_built_without_computing(style, monkeypatch):
    """Where Keras cannot run tensors without numbers it runs 83 rows of 83 steps, for a shape."""
    from keras.src.backend.torch import core

    known = core.device_scope

    def device_scope(device):
        assert sys.exc_info()[0] is None, "not without numbers"
        return known(device)

    monkeypatch.setattr(core, "device_scope", device_scope)
    sizes = dict(num_heads=2, slstm_at=[1], block_style=style, packed=True)
    lm = XLSTMCausalLM(XLSTMBackbone(9, 2, 8, **sizes))
    assert lm.output.shape == (None, None, 9)
    x = keras.layers.Masking()(keras.Input((None, 8)))
    for layer in (SLSTM(4, num_heads=2), MLSTM(4, num_heads=2, go_backwards=True)):
        assert layer(x).shape == (None, 4)
