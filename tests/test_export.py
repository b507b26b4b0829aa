"""Export: every format, loaded and run outside Keras, gives the numbers that Keras gives."""

import functools

import keras
import numpy as np
import pytest
from keras import ops, tree

from keras_xlstm import kernels
from keras_xlstm.layers import MLSTM, SLSTM
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

BACKEND = keras.backend.backend()
FORMATS = {
    "jax": ["tf_saved_model"],
    "tensorflow": ["tf_saved_model", "onnx", "litert"],
    "torch": ["onnx", "torch", "openvino"],
}[BACKEND]
SUFFIX = {"onnx": ".onnx", "litert": ".tflite", "torch": ".pt2", "openvino": ".xml"}
# The others want lengths that are known.
ANY_LENGTH = [f for f in FORMATS if f in ("tf_saved_model", "onnx") and BACKEND != "torch"]
# OpenVINO has no loops of TensorFlow, and nothing of what JAX writes.
STEP_FORMATS = FORMATS + (["openvino"] if BACKEND == "tensorflow" else [])
each_format = pytest.mark.parametrize("format", FORMATS)
STYLES = {"large": dict(slstm_at=[1]), "original": dict(slstm_at=[0], block_style="original")}


@functools.cache
def language_model(style="large"):
    keras.utils.set_random_seed(0)
    tokenizer = XLSTMTokenizer.byte_level()
    sizes = dict(num_layers=2, hidden_dim=16, num_heads=2, ffn_round_up_to=8)
    backbone = XLSTMBackbone(tokenizer.vocabulary_size(), **sizes, **STYLES[style])
    lm = XLSTMCausalLM(backbone, XLSTMCausalLMPreprocessor(tokenizer, 24))
    lm.compile(sampler="greedy")
    noise = np.random.default_rng(0)
    for w in lm.trainable_variables:
        w.assign(w + 0.2 * noise.normal(size=w.shape))
    return lm


def sequence_layers():
    inputs = keras.Input((None, 6), name="x")
    x = SLSTM(8, num_heads=2, return_sequences=True)(inputs)
    mlstm = MLSTM(8, num_heads=2, return_sequences=True, chunk_size=16)
    model = keras.Model(inputs, mlstm(x))
    model(inputs)  # Keras exports what was called once
    return model


def export(model, path, format, shapes=None):
    """Writes the artifact, for `shapes` of the inputs or, with `None`, for those of the model.

    Returns a function from a list of arrays, in the order of the inputs, to a list of arrays.
    """
    path = str(path / f"model{SUFFIX.get(format, '')}")
    signature = None
    if shapes is not None:
        specs = [
            keras.InputSpec(shape=shape, dtype=x.dtype, name=x.name)
            for x, shape in zip(model.inputs, shapes, strict=True)
        ]
        signature = specs if len(specs) == 1 else [specs]
    model.export(path, format=format, input_signature=signature, verbose=False)
    names = [x.name for x in model.inputs]
    return {
        "tf_saved_model": saved_model,
        "onnx": onnx,
        "litert": litert,
        "torch": torch_program,
        "openvino": openvino,
    }[format](path, names)


def saved_model(path, names):
    import tensorflow as tf

    served = tf.saved_model.load(path)
    return lambda inputs: [
        np.asarray(x) for x in tree.flatten(served.serve(inputs if len(names) > 1 else inputs[0]))
    ]


def onnx(path, names):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    assert [x.name for x in session.get_inputs()] == names
    return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def litert(path, names):
    import tensorflow as tf

    # Without TensorFlow's own operations, as on a phone.
    resolver = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = tf.lite.Interpreter(path, experimental_op_resolver_type=resolver)
    runner = interpreter.get_signature_runner()

    def run(inputs):
        outputs = runner(**dict(zip(names, inputs, strict=True)))
        return [outputs[name] for name in sorted(outputs, key=lambda n: int(n.split("_")[-1]))]

    return run


def openvino(path, names):
    from openvino import compile_model

    # By position: of torch models it loses the names. Of TensorFlow's it returns more than asked.
    compiled = compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    hidden = 0 if BACKEND == "torch" else sum(not is_asked(x) for x in compiled.outputs)
    return lambda inputs: list(compiled(inputs).values())[: len(compiled.outputs) - hidden]


def is_asked(output):
    return any(name.startswith("Identity") for name in output.get_names())


def torch_program(path, names):
    import torch

    program = torch.export.load(path).module()

    def run(inputs):
        inputs = [torch.from_numpy(x) for x in inputs]
        outputs = program(inputs if len(names) > 1 else inputs[0])
        return [x.detach().numpy() for x in tree.flatten(outputs)]

    return run


def random_inputs(model, B, S):
    rng = np.random.default_rng(1)
    arrays = []
    for x in model.inputs:
        shape = [B, *(S if size is None else size for size in x.shape[1:])]
        tokens = x.dtype == "int32"
        array = rng.integers(2, 258, shape) if tokens else rng.normal(size=shape)
        # What the sLSTM divides by is a sum of exponentials: near 0 it would tell of rounding only.
        arrays.append(np.abs(array) + 0.5 if x.name.endswith("_n") else array)
    return [a.astype(x.dtype) for a, x in zip(arrays, model.inputs, strict=True)]


def assert_equals_keras(run, model, inputs, tolerance=1e-5):
    expected = model(inputs if len(inputs) > 1 else inputs[0])
    expected = [ops.convert_to_numpy(x) for x in tree.flatten(expected)]
    got = run(inputs)
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(np.abs(y).max(), 1))


@pytest.mark.parametrize("format", STEP_FORMATS)
@pytest.mark.parametrize(
    "style", ["large", pytest.param("original", marks=pytest.mark.long_on_xla)]
)
def test_step_equals_keras(format, style, tmp_path):
    if (BACKEND, style, format) == ("tensorflow", "original", "onnx"):
        pytest.skip("tf2onnx 1.17 has no erfc, which TensorFlow's gelu is made of")
    model = language_model(style).step_model()
    inputs = random_inputs(model, 2, 1)
    shapes = [x.shape for x in inputs] if BACKEND == "torch" else None
    tolerance = 1e-4 if format == "openvino" else 1e-5  # its exponentials are approximations
    assert_equals_keras(export(model, tmp_path, format, shapes), model, inputs, tolerance)


@pytest.mark.parametrize(
    "format",
    [x if x == FORMATS[0] else pytest.param(x, marks=pytest.mark.long_on_xla) for x in FORMATS],
)
def test_prompt_then_steps_continue_as_keras_does(format, tmp_path):
    """What a server or a phone does with two artifacts: reads a prompt, and decodes."""
    lm, prompt, length = language_model(), "To be, or", 9
    (tmp_path / "prompt").mkdir()
    prefill, step = lm.step_model(length), lm.step_model()
    shapes = [[(1, *x.shape[1:]) for x in model.inputs] for model in (prefill, step)]
    read = export(prefill, tmp_path / "prompt", format, shapes[0])
    go_on = export(step, tmp_path, format, shapes[1])

    tokens = [int(id) for id in lm.preprocessor.tokenizer(prompt)[:length]]
    state = [np.zeros(shape, "float32") for shape in shapes[1][1:]]
    logits, *state = read([np.array([tokens], "int32"), *state])
    continued = []
    for _ in range(8):
        continued.append(int(logits[0, -1].argmax()))
        logits, *state = go_on([np.array([continued[-1:]], "int32"), *state])

    expected, cache = [], None
    for _ in range(8):
        x, _, cache = lm.call_with_cache(np.array([expected[-1:] or tokens], "int32"), cache)
        expected.append(int(ops.convert_to_numpy(x)[0, -1].argmax()))
    assert continued == expected


@each_format
def test_sequence_layers_equal_keras(format, tmp_path):
    model = sequence_layers()
    shapes = None if format in ANY_LENGTH else [(2, 20, 6)]
    run = export(model, tmp_path, format, shapes)
    for S in (20, 3) if format in ANY_LENGTH else (20,):
        assert_equals_keras(run, model, random_inputs(model, 2, S))


@pytest.mark.parametrize("format", ANY_LENGTH)
def test_prompts_of_any_length_equal_keras(format, tmp_path):
    model = language_model().step_model(None)
    run = export(model, tmp_path, format)
    for B, S in ((2, 9), (1, 70)):
        assert_equals_keras(run, model, random_inputs(model, B, S))


def test_whole_language_model_equals_keras(tmp_path):
    format, lm = FORMATS[0], language_model()
    run = export_whole(lm, tmp_path, format)
    inputs = {x.name: np.ones((2, 9), "int32") for x in lm.inputs}
    inputs["token_ids"] += np.arange(18, dtype="int32").reshape(2, 9)
    inputs["padding_mask"][1, 5:] = 0
    expected = ops.convert_to_numpy(lm(inputs))
    np.testing.assert_allclose(run(inputs), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def export_whole(lm, path, format):
    path = str(path / f"model{SUFFIX.get(format, '')}")
    spec = {x.name: keras.InputSpec(shape=(2, 9), dtype="int32", name=x.name) for x in lm.inputs}
    lm.export(path, format=format, input_signature=[spec], verbose=False)
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        return lambda inputs: session.run(None, inputs)[0]
    import tensorflow as tf

    served = tf.saved_model.load(path)
    return lambda inputs: np.asarray(served.serve(inputs))


def test_step_model_starts_at_zero_and_shares_weights():
    lm = language_model()
    step = lm.step_model()
    assert [x.name for x in step.inputs] == [
        "token_ids",
        *("block_0_C", "block_0_n", "block_0_m"),
        *("block_1_h", "block_1_c", "block_1_n", "block_1_m"),
    ]
    assert {id(w) for w in step.weights} == {id(w) for w in lm.backbone.weights}
    tokens = np.array([[5]], "int32")
    logits = step([tokens, *(np.zeros((1, *x.shape[1:]), "float32") for x in step.inputs[1:])])[0]
    expected = lm({"token_ids": tokens, "padding_mask": np.ones((1, 1), "int32")})
    np.testing.assert_allclose(*(ops.convert_to_numpy(x) for x in (logits, expected)), atol=1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="its formats take the kernels of XLA")
def test_exported_graphs_hold_plain_forms(tmp_path):
    x = np.ones((1, 8, 1, 4), "float32")
    seen = []

    class Spy(keras.layers.Layer):
        def call(self, x):
            seen.append(kernels.explain(x, x, x, x[..., 0], x[..., 0]))
            return x

    inputs = keras.Input((8, 1, 4), batch_size=1)
    model = keras.Model(inputs, Spy()(inputs))
    model(x)
    assert "leaves a graph to export" not in seen[-1]
    format = {"tensorflow": "tf_saved_model", "torch": "torch"}[BACKEND]
    model.export(str(tmp_path / "model.pt2"), format=format, verbose=False)
    assert "* chunkwise" in seen[-1]
    assert "leaves a graph to export" in seen[-1]
