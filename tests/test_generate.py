"""Generation: a batch of prompts of different lengths gives each row what it would get alone."""

import functools

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

T = 24
PROMPTS = ["a", "hello", "a much longer one!", "", "x y", "some more", "1", "zz zz zz zz"]
SAMPLERS = {
    "greedy": keras_hub.samplers.GreedySampler,
    "beam": lambda: keras_hub.samplers.BeamSampler(num_beams=3),
    "contrastive": lambda: keras_hub.samplers.ContrastiveSampler(k=3, alpha=0.4),
}


@functools.cache
def language_model(block_style):
    """A model that writes printable text, since all other bytes have logit 0.

    What Keras draws differs between backends, so all matrices are drawn by NumPy.
    """
    tokenizer = XLSTMTokenizer.byte_level()
    backbone = XLSTMBackbone(
        tokenizer.vocabulary_size(),
        num_layers=2,
        hidden_dim=16,
        num_heads=2,
        ffn_round_up_to=8,
        slstm_at=[1],
        block_style=block_style,
    )
    noise = np.random.default_rng(3)
    for w in backbone.trainable_variables:
        drawn = "kernel" in w.path or "embeddings" in w.path or "input_gate" in w.path
        w.assign((0 if drawn else w) + 0.3 * noise.normal(size=w.shape))
    head = ops.convert_to_numpy(backbone.token_embedding.reverse_embeddings).copy()
    head[:, 1:34] = head[:, 129:] = 0
    backbone.token_embedding.reverse_embeddings.assign(head)
    return XLSTMCausalLM(backbone, XLSTMCausalLMPreprocessor(tokenizer, sequence_length=T))


def new_generator(sampler, block_style="large", **kwargs):
    model = language_model(block_style)
    model = XLSTMCausalLM(model.backbone, model.preprocessor)
    model.compile(sampler=SAMPLERS[sampler]() if sampler in SAMPLERS else sampler, **kwargs)
    return model


# What one test has compiled, the others use.
generator = functools.cache(new_generator)


def prompts_of(texts, length=T):
    inputs = language_model("large").preprocessor.generate_preprocess(texts, length)
    return {name: ops.convert_to_numpy(x) for name, x in inputs.items()}


def generate(model, inputs, stop_token_ids=None):
    outputs = model.make_generate_function()(inputs, stop_token_ids)
    return {name: ops.convert_to_numpy(x) for name, x in outputs.items()}


def row(inputs, i):
    return {name: x[i : i + 1] for name, x in inputs.items()}


def assert_same(got, expected):
    for name in ("token_ids", "padding_mask"):
        np.testing.assert_array_equal(got[name], expected[name])


def stops_in(outputs, inputs):
    """Two ids that only some of the rows wrote: with them some rows end early, and some not."""
    written = np.where(inputs["padding_mask"], -1, outputs["token_ids"])[:, :-1]
    rows = {int(i): set(np.nonzero((written == i).any(1))[0]) for i in np.unique(written) if i >= 0}
    stops = [i for i, ends in rows.items() if len(ends) == 1][:2]
    stopped = set().union(*(rows[i] for i in stops))
    assert stops and len(stopped) < len(written), "the rows wrote all the same"
    return tuple(stops)


@pytest.mark.parametrize(
    "block_style, sampler",
    [
        ("large", "greedy"),
        ("large", "beam"),
        pytest.param("large", "contrastive", marks=pytest.mark.long_on_xla),
        pytest.param("original", "greedy", marks=pytest.mark.long_on_xla),
        pytest.param("original", "beam", marks=pytest.mark.long),
        pytest.param("original", "contrastive", marks=pytest.mark.long),
    ],
)
def test_each_row_gets_what_it_gets_alone(block_style, sampler):
    prompts = PROMPTS if sampler == "greedy" else PROMPTS[:4]
    model, inputs = generator(sampler, block_style), prompts_of(prompts)
    free = generate(model, inputs)
    assert free["padding_mask"].all()
    new = inputs["padding_mask"] == 0
    np.testing.assert_array_equal(free["token_ids"][~new], inputs["token_ids"][~new])
    stops = stops_in(free, inputs)
    stopped = generate(model, inputs, stops)
    finished = ~stopped["padding_mask"][:, -1]
    assert finished.any() and not finished.all()
    for i in range(len(prompts)):
        assert_same(row(stopped, i), generate(model, row(inputs, i), stops))
        if sampler == "greedy":
            assert_same(row(free, i), generate(model, row(inputs, i)))


@pytest.mark.parametrize("block_style", ["large", "original"])
def test_greedy_takes_the_likeliest_token_of_the_whole_text(block_style):
    model, inputs = generator("greedy", block_style), prompts_of(PROMPTS)
    tokens = generate(model, inputs)["token_ids"]
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    likeliest = ops.convert_to_numpy(model(x)).argmax(-1)
    for i, length in enumerate(inputs["padding_mask"].sum(1)):
        np.testing.assert_array_equal(tokens[i, length:], likeliest[i, length - 1 : -1])


def test_stop_tokens_end_a_row_and_padding_follows():
    model, inputs = generator("greedy"), prompts_of(PROMPTS)
    free = generate(model, inputs)
    stops = stops_in(free, inputs)
    stopped = generate(model, inputs, stops)
    for i, length in enumerate(inputs["padding_mask"].sum(1)):
        hits = [j for j in range(length, T) if free["token_ids"][i, j] in stops]
        end = hits[0] + 1 if hits else T
        np.testing.assert_array_equal(stopped["padding_mask"][i], np.arange(T) < end)
        np.testing.assert_array_equal(stopped["token_ids"][i, :end], free["token_ids"][i, :end])
        assert (stopped["token_ids"][i, end:] == 1).all()


def test_a_stop_token_in_a_prompt_ends_nothing():
    model, inputs = generator("greedy"), prompts_of(["é"])
    byte = int(inputs["token_ids"][0, 1])  # which this model never writes
    assert_same(generate(model, inputs, (byte,)), generate(model, inputs))


@pytest.mark.parametrize("sampler", ["top_k", "top_p", "random"])
def test_random_samplers_keep_prompts_and_draw_anew(sampler):
    if sampler == "top_p":
        sampler = keras_hub.samplers.TopPSampler(p=0.9)
    model, inputs = new_generator(sampler), prompts_of(PROMPTS)
    first, second = generate(model, inputs), generate(model, inputs)
    new = inputs["padding_mask"] == 0
    for out in (first, second):
        np.testing.assert_array_equal(out["token_ids"][~new], inputs["token_ids"][~new])
        assert (out["token_ids"] >= 0).all() and out["padding_mask"].all()
    assert (first["token_ids"][new] != second["token_ids"][new]).any()


def test_plain_inputs_of_generate_step_give_the_same():
    model, inputs = generator("greedy", run_eagerly=True), prompts_of(PROMPTS)
    expected = generate(model, inputs)
    inputs = {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    got = model.generate_step(inputs)
    assert_same({name: ops.convert_to_numpy(x) for name, x in got.items()}, expected)


def test_one_compilation_serves_all_prompts_of_a_bucket(monkeypatch):
    model = new_generator("greedy")
    shapes, generate_step = [], model.generate_step

    def spy(inputs, stop_token_ids=None):
        shapes.append(tuple(inputs["prompt"].shape))
        return generate_step(inputs, stop_token_ids)

    monkeypatch.setattr(model, "generate_step", spy)
    for text in ("", "a", "four", "fifteen letters"):
        generate(model, prompts_of([text, "two"]))
    assert set(shapes) == {(2, 16)}
    if keras.backend.backend() != "torch":  # which compiles nothing
        assert len(shapes) == 1
    generate(model, prompts_of(["sixteen letters!", "two"]))
    assert set(shapes) == {(2, 16), (2, T)}
    generate(model, prompts_of(["sixteen letters!", "two"], length=64))
    assert set(shapes) == {(2, 16), (2, T), (2, 32)}


def test_prompts_are_read_at_once_and_no_step_is_wasted(monkeypatch):
    model = new_generator("greedy")
    lengths, advance, steps = [], model._advance, []

    def spy(token_ids, cache, padding_mask=None):
        lengths.append(token_ids.shape[1])
        return advance(token_ids, cache, padding_mask)

    class Counting(keras_hub.samplers.GreedySampler):
        def run_loop(self, cond, body, model=None, loop_vars=None, maximum_iterations=None):
            steps.append(int(maximum_iterations))
            return super().run_loop(cond, body, model, loop_vars, maximum_iterations)

    monkeypatch.setattr(model, "_advance", spy)
    model.compile(sampler=Counting(), run_eagerly=True)
    inputs = prompts_of(PROMPTS[:3])
    generate(model, inputs)
    assert lengths.count(T) == 1 and set(lengths) == {1, T}
    assert steps == [T - inputs["padding_mask"].sum(1).min()]


def test_full_prompts_return_unchanged():
    model = generator("greedy")
    full = prompts_of(["exactly as long as the whole", "this one too: not one to go"])
    assert full["padding_mask"].all()
    assert_same(generate(model, full), full)
    assert_same(generate(model, full, (70,)), full)
    both = prompts_of(["exactly as long as the whole", "short"])
    assert_same(row(generate(model, both), 0), row(both, 0))
    assert_same(row(generate(model, both), 1), generate(model, row(both, 1)))


def test_strings_in_strings_out():
    model = generator("greedy")
    one = model.generate("hello", stop_token_ids=None)
    assert isinstance(one, str) and one.startswith("hello") and len(one) == T - 1
    several = model.generate(["hello", "x y"], stop_token_ids=None)
    assert several == [one, model.generate("x y", stop_token_ids=None)]
    short = model.generate("hello", max_length=10, stop_token_ids=None)
    assert short == one[:9]
    stop = one[8]
    end = one.index(stop, 5) + 1
    assert model.generate("hello", stop_token_ids=(2 + ord(stop),)) == one[:end]
    stripped = model.generate(["hello", "x y"], stop_token_ids=None, strip_prompt=True)
    assert stripped == [several[0][5:], several[1][3:]]
    assert model.generate(["hello"], stop_token_ids="auto")[0].startswith("hello")


def test_auto_stops_at_the_end_token():
    model, inputs = generator("greedy"), prompts_of(PROMPTS)
    texts = model.generate(PROMPTS, stop_token_ids="auto")
    expected = generate(model, inputs, (0,))
    assert texts == model.preprocessor.generate_postprocess(expected)


def test_token_ids_without_a_preprocessor():
    model, inputs = generator("greedy"), prompts_of(PROMPTS)
    model = XLSTMCausalLM(model.backbone)
    model.compile(sampler="greedy")
    lists = {name: x.tolist() for name, x in inputs.items()}
    out = model.generate(lists, stop_token_ids=None)
    assert_same(out, generate(model, inputs))
    stripped = model.generate(inputs, stop_token_ids=None, strip_prompt=True)
    for i, length in enumerate(inputs["padding_mask"].sum(1)):
        got = stripped["token_ids"][i][stripped["padding_mask"][i]]
        np.testing.assert_array_equal(got, out["token_ids"][i, length:])
    with pytest.raises(ValueError, match="preprocessor"):
        model.generate(inputs)


def test_prompts_must_stand_at_the_left():
    model = generator("greedy")
    tokens = np.full((3, 4), 70, "int32")
    for mask in ([0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]):
        inputs = {"token_ids": tokens, "padding_mask": [[1, 1, 1, 1], mask, [1, 0, 0, 0]]}
        with pytest.raises(ValueError, match=r"at least one token.*padding_mask\[1\]=.*right"):
            generate(model, inputs)
    with pytest.raises(ValueError, match=r"shape \(batch, length\).*\(3, 4\).*\(3, 3\)"):
        generate(model, {"token_ids": tokens, "padding_mask": np.ones((3, 3))})
    with pytest.raises(ValueError, match="`token_ids` must have 2 axes"):
        generate(model, {"token_ids": tokens[0], "padding_mask": np.ones(4)})


def test_an_empty_prompt_needs_a_start_token():
    model = language_model("large")
    bare = XLSTMCausalLMPreprocessor(
        model.preprocessor.tokenizer, sequence_length=8, add_start_token=False
    )
    model = XLSTMCausalLM(model.backbone, bare)
    with pytest.raises(ValueError, match=r"padding_mask\[1\].*start token"):
        model.generate(["a", ""])


def test_samplers_that_cannot_serve_say_why():
    inputs = prompts_of(["a"])
    with pytest.raises(ValueError, match=r"cannot be rolled back.*another sampler"):
        generate(new_generator(keras_hub.samplers.SpeculativeSampler()), inputs)
    beams = keras_hub.samplers.BeamSampler(return_all_beams=True)
    with pytest.raises(ValueError, match="return_all_beams=False"):
        generate(new_generator(beams), inputs)
    with pytest.raises(ValueError, match=r"`stop_token_ids` must be .*0 to 257.*258\)"):
        generate(generator("greedy"), inputs, (0, 258))


def test_mixed_precision_generates():
    model = language_model("original")
    config = model.backbone.get_config() | {"dtype": "mixed_bfloat16"}
    backbone = XLSTMBackbone.from_config(config)
    backbone.set_weights(model.backbone.get_weights())
    model = XLSTMCausalLM(backbone)
    inputs = prompts_of(PROMPTS[:3])
    model.compile(sampler=SAMPLERS["contrastive"]())  # the one that keeps hidden states
    together = generate(model, inputs)
    assert together["padding_mask"].all()
    for name, x in inputs.items():
        np.testing.assert_array_equal(together[name][:, 0], x[:, 0])
    assert (together["token_ids"] >= 0).all()


def test_weights_may_change_between_two_generations():
    model, inputs = generator("greedy"), prompts_of(PROMPTS[:1])
    model = XLSTMCausalLM(XLSTMBackbone.from_config(model.backbone.get_config()))
    noise = np.random.default_rng(5)
    for turn in range(2):
        if turn:
            model.backbone.enable_lora(2)  # other variables
        for w in model.trainable_variables:
            w.assign(w + 0.3 * noise.normal(size=w.shape))
        model.compile(sampler="greedy", run_eagerly=True)
        plain = generate(model, inputs)
        model.compile(sampler="greedy")
        before = generate(model, inputs)
        assert_same(before, plain)
        model.backbone.set_weights([-w for w in model.backbone.get_weights()])
        after = generate(model, inputs)
        assert (before["token_ids"] != after["token_ids"]).any()
        model.compile(sampler="greedy", run_eagerly=True)
        assert_same(after, generate(model, inputs))


def test_kernels_say_how_a_model_generates():
    model = new_generator("greedy", run_eagerly=True)
    explained = kernels.explain(model.call_with_cache, model, op="repeated")
    assert "* plain" in explained
    if keras.backend.backend() == "torch":
        assert "run_eagerly=True" in explained
        model.compile()
        assert "* traced" in kernels.explain(model.call_with_cache, model, op="repeated")
