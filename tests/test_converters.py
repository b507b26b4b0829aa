"""Checkpoints of other libraries: their names and layouts, their numbers, and what is refused.

The files here are written from the documented formats, so that all of this is tested without the
other libraries; `transformers` itself is compared with where it is installed, and the outputs of
the `xlstm` package are recorded in `xlstm_outputs.json`.
"""

import json
import math
import pickle
import re
import types
import zlib
from pathlib import Path

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from keras import ops

import keras_xlstm as kx
from keras_xlstm.converters import (
    from_xlstm,
    large,
    safetensors,
    state_from_xlstm,
    state_to_xlstm,
    to_xlstm,
    transformers,
    weights,
)
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32"}
RECORDED = json.loads(Path(__file__).with_name("xlstm_outputs.json").read_text("utf-8"))
V, D, NH, QK, HV, FF = 13, 24, 2, 12, 24, 64  # 2.667 x 24 = 64.008: not 128

CONFIG = {
    "model_type": "xlstm",
    "architectures": ["xLSTMForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_heads": NH,
    "gate_soft_cap": 5.0,
    "output_logit_soft_cap": 3.0,
    "eps": 1e-3,
    "norm_eps": 1e-4,
}


def numpy(x):
    return ops.convert_to_numpy(x)


def some(key, shape, dtype="float32"):
    """Numbers that depend on the name of a weight, the same everywhere and for ever."""
    phase = zlib.crc32(key.encode()) % 1000
    x = np.sin(1.7 * np.arange(1, math.prod(shape) + 1) + phase).reshape(shape)
    gate_bias = {"igate_preact.bias": -2.0, "fgate_preact.bias": 3.0}
    x = 0.3 * x + next((b for end, b in gate_bias.items() if key.endswith(end)), 0.0)
    return x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def hugging_face(mode="single", dtype="float32", blocks=2, head=True):
    """The tensors of a checkpoint of `transformers`, as documented."""
    shapes = {"backbone.embeddings.weight": (V, D), "backbone.out_norm.weight": (D,)}
    layer = {
        "norm_mlstm.weight": (D,),
        "norm_ffn.weight": (D,),
        "mlstm_layer.multihead_norm.weight": (HV,),
        "mlstm_layer.out_proj.weight": (D, HV),
        "ffn.proj_down.weight": (D, FF),
    }
    if mode == "single":
        layer |= {f"mlstm_layer.{x}.weight": (QK, D) for x in "qk"}
        layer |= {f"mlstm_layer.{x}.weight": (HV, D) for x in ("v", "ogate_preact")}
        layer |= {f"mlstm_layer.{x}gate_preact.weight": (NH, D) for x in "if"}
        layer |= {f"mlstm_layer.{x}gate_preact.bias": (NH,) for x in "if"}
        layer |= {f"ffn.{x}.weight": (FF, D) for x in ("proj_up", "proj_up_gate")}
    else:
        layer["mlstm_layer.qkv_opreact.weight"] = (2 * QK + 2 * HV, D)
        layer["mlstm_layer.ifgate_preact.weight"] = (2 * NH, D)
        layer["mlstm_layer.ifgate_preact.bias"] = (2 * NH,)
        layer["ffn.proj_up_gate_z.weight"] = (2 * FF, D)
    for i in range(blocks):
        shapes |= {f"backbone.blocks.{i}.{name}": shape for name, shape in layer.items()}
    if head:
        shapes["lm_head.weight"] = (V, D)
    return {key: some(key, shape, dtype) for key, shape in shapes.items()}


def write_file(path, arrays):
    header, data = {}, b""
    for key, x in arrays.items():
        end = len(data) + x.nbytes
        header[key] = {
            "dtype": NAMES[x.dtype.name],
            "shape": x.shape,
            "data_offsets": [len(data), end],
        }
        data += x.tobytes()
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_file(path):
    blob = Path(path).read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header, arrays = json.loads(blob[8:start]), {}
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    for key, x in header.items():
        begin, end = (start + offset for offset in x["data_offsets"])
        arrays[key] = np.frombuffer(blob[begin:end], kinds[x["dtype"]]).reshape(x["shape"])
    return arrays


def write_folder(folder, arrays, config=CONFIG, files=1):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        write_file(folder / "model.safetensors", arrays)
        return str(folder)
    places = {}
    for n in range(files):
        part = {key: arrays[key] for key in sorted(arrays)[n::files]}
        write_file(folder / f"model-{n}.safetensors", part)
        places |= dict.fromkeys(part, f"model-{n}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return str(folder)


def load(folder, **kwargs):
    return XLSTMCausalLM.from_preset(folder, preprocessor=None, **kwargs)


def assert_same(got, expected):
    assert set(got) == set(expected)
    for key, x in expected.items():
        assert got[key].dtype == x.dtype, key
        np.testing.assert_array_equal(got[key].view("uint8"), x.view("uint8"), key)


def logits(model, token_ids):
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return numpy(model(inputs))


def in_pieces(model, token_ids, first):
    """Logits of a prefill and of one step after the other."""
    pieces = [token_ids[:, :first]]
    pieces += [token_ids[:, t : t + 1] for t in range(first, token_ids.shape[1])]
    outputs, cache = [], None
    for piece in pieces:
        y, _, cache = model.call_with_cache(piece, cache)
        outputs.append(numpy(y))
    return np.concatenate(outputs, axis=1)


def assert_close(got, expected, tolerance=1e-4):
    """Relative to the largest number, as the promise is made."""
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


# === Names and layouts of `transformers` ===


@pytest.mark.parametrize("mode", ["single", "fused"])
@pytest.mark.parametrize("files", [1, 3])
def test_each_tensor_finds_its_variable(tmp_path, mode, files):
    arrays = hugging_face(mode)
    lm = load(write_folder(tmp_path / "hf", arrays, CONFIG | {"weight_mode": mode}, files))
    backbone = lm.backbone
    assert type(lm) is XLSTMCausalLM
    assert (lm.logit_soft_cap, backbone.gate_soft_cap) == (3.0, 5.0)
    assert (backbone.denominator_epsilon, backbone.norm_epsilon) == (1e-3, 1e-4)
    assert backbone.count_params() == sum(x.size for x in arrays.values())
    block = backbone.stack.blocks[1]
    cell, name = block.mixer.cell, "backbone.blocks.1."
    if mode == "single":
        single = {key.removeprefix(name): x for key, x in arrays.items()}
    else:
        qkvo = arrays[f"{name}mlstm_layer.qkv_opreact.weight"]
        q, k, v, o = np.split(qkvo, [QK, 2 * QK, 2 * QK + HV])
        i, f = np.split(arrays[f"{name}mlstm_layer.ifgate_preact.weight"], 2)
        i_bias, f_bias = np.split(arrays[f"{name}mlstm_layer.ifgate_preact.bias"], 2)
        gate, up = np.split(arrays[f"{name}ffn.proj_up_gate_z.weight"], 2)
        single = {f"mlstm_layer.{n}.weight": x for n, x in zip("qkv", (q, k, v), strict=True)}
        single |= {"mlstm_layer.ogate_preact.weight": o, "ffn.proj_up.weight": up}
        single |= {"mlstm_layer.igate_preact.weight": i, "mlstm_layer.fgate_preact.weight": f}
        single |= {"mlstm_layer.igate_preact.bias": i_bias, "mlstm_layer.fgate_preact.bias": f_bias}
        single["ffn.proj_up_gate.weight"] = gate
    for theirs, ours in {
        "q.weight": cell.query,
        "k.weight": cell.key,
        "v.weight": cell.value,
        "ogate_preact.weight": cell.output_gate,
        "igate_preact.weight": cell.input_gate,
        "fgate_preact.weight": cell.forget_gate,
    }.items():
        np.testing.assert_array_equal(numpy(ours.kernel), single[f"mlstm_layer.{theirs}"].T)
    for theirs, ours in {"igate": cell.input_gate, "fgate": cell.forget_gate}.items():
        np.testing.assert_array_equal(numpy(ours.bias), single[f"mlstm_layer.{theirs}_preact.bias"])
    for theirs, ours in {"proj_up_gate": block.ffn.gate, "proj_up": block.ffn.up}.items():
        np.testing.assert_array_equal(numpy(ours.kernel), single[f"ffn.{theirs}.weight"].T)
    heads = arrays[f"{name}mlstm_layer.multihead_norm.weight"].reshape(NH, HV // NH)
    np.testing.assert_array_equal(numpy(cell.norm.scale), heads)
    embedding = backbone.token_embedding
    np.testing.assert_array_equal(numpy(embedding.embeddings), arrays["backbone.embeddings.weight"])
    np.testing.assert_array_equal(numpy(embedding.reverse_embeddings), arrays["lm_head.weight"].T)
    lm.export_to_transformers(str(tmp_path / "back"), weight_mode=mode)
    assert_same(read_file(tmp_path / "back" / "model.safetensors"), arrays)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(tmp_path, dtype):
    arrays = hugging_face(dtype=dtype)
    folder = write_folder(tmp_path / "hf", arrays)
    wide = load(folder)
    kernel = wide.backbone.stack.blocks[0].mixer.cell.query.kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == "float32"
    expected = arrays["backbone.blocks.0.mlstm_layer.q.weight"].T.astype("float32")
    np.testing.assert_array_equal(numpy(kernel), expected)
    half = load(folder, dtype=dtype)
    kernel = half.backbone.stack.blocks[0].mixer.cell.query.kernel
    assert keras.backend.standardize_dtype(kernel.dtype) == dtype
    half.export_to_transformers(str(tmp_path / "back"))
    assert_same(read_file(tmp_path / "back" / "model.safetensors"), arrays)


def test_export_cuts_into_shards_and_an_index(tmp_path):
    arrays, back = hugging_face(), tmp_path / "back"
    lm = load(write_folder(tmp_path / "hf", arrays))
    lm.export_to_transformers(str(back), max_shard_size=8 * 2**-20)  # 8 kB
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in arrays.values())
    found = {}
    for file in files:
        part = read_file(file)
        assert {index["weight_map"][key] for key in part} == {file.name}
        assert len(part) == 1 or sum(x.nbytes for x in part.values()) <= 8 * 2**10
        found |= part
    assert_same(found, arrays)
    again = load(str(back))
    for ours, expected in zip(again.trainable_variables, lm.trainable_variables, strict=True):
        np.testing.assert_array_equal(numpy(ours), numpy(expected))


def test_a_head_is_tied_if_the_weights_are(tmp_path):
    """`transformers` keeps two matrices whatever its configuration says."""
    tied, arrays = CONFIG | {"tie_word_embeddings": True}, hugging_face()
    lm = load(write_folder(tmp_path / "differ", arrays, tied))
    assert not lm.backbone.tie_embeddings
    without = hugging_face(head=False)
    lm = load(write_folder(tmp_path / "without", without, tied))
    assert lm.backbone.tie_embeddings
    same = without | {"lm_head.weight": arrays["backbone.embeddings.weight"]}
    lm = load(write_folder(tmp_path / "same", same, tied))
    assert lm.backbone.tie_embeddings
    lm.export_to_transformers(str(tmp_path / "back"))
    assert_same(read_file(tmp_path / "back" / "model.safetensors"), same)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_every_kerashub_door_opens(tmp_path):
    folder = write_folder(tmp_path / "hf", hugging_face())
    token_ids = np.arange(1, 7)[None]
    lm = keras_hub.models.CausalLM.from_preset(folder, preprocessor=None)
    backbone = keras_hub.models.Backbone.from_preset(folder)
    assert (type(lm), type(backbone)) == (XLSTMCausalLM, XLSTMBackbone)
    np.testing.assert_array_equal(logits(backbone, token_ids), logits(lm.backbone, token_ids))
    empty = XLSTMBackbone.from_preset(folder, load_weights=False)
    assert np.all(numpy(empty.stack.norm.scale) == 1)
    assert load(folder, logit_soft_cap=None).logit_soft_cap is None
    (tmp_path / "hf" / "config.json").write_text(json.dumps(CONFIG | {"model_type": "mamba"}))
    with pytest.raises(ValueError, match="KerasHub has no converter.*mamba"):
        keras_hub.models.CausalLM.from_preset(folder)


def test_a_model_without_head_makes_a_backbone(tmp_path):
    arrays = hugging_face(head=False)
    bare = {key.removeprefix("backbone."): x for key, x in arrays.items()}
    folder = write_folder(tmp_path / "bare", bare)
    backbone = XLSTMBackbone.from_preset(folder)
    np.testing.assert_array_equal(numpy(backbone.stack.norm.scale), bare["out_norm.weight"])
    with pytest.raises(ValueError, match='"lm_head.weight" is missing'):
        load(folder)


# === Configurations ===


def test_config_defaults_are_those_of_the_7b_model():
    config = transformers.backbone_config({"model_type": "xlstm"})
    expected = dict(vocabulary_size=50304, num_layers=32, hidden_dim=4096, num_heads=8)
    expected |= dict(qk_dim_factor=0.5, v_dim_factor=1.0, ffn_dim_factor=2.667)
    expected |= dict(ffn_round_up_to=64, gate_soft_cap=15.0, tie_embeddings=False)
    assert config == expected | dict(norm_epsilon=1e-6, denominator_epsilon=1e-6)
    assert large.logit_soft_cap({}, "config.json") == 30.0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(use_bias=True), "config.json: `use_bias` must be False.*Received: use_bias=True"),
        (dict(num_blocks=3), "`num_hidden_layers` and `num_blocks` are one number.*2 and 3"),
        (dict(embedding_dim=32), "`hidden_size` and `embedding_dim` are one.*24 and 32"),
        (dict(num_heads="two"), "`num_heads` must be a positive whole number.*'two'"),
        (dict(num_heads=1.5), "`num_heads` must be a positive whole number.*1.5"),
        (dict(eps=0), "`eps` must be a positive number.*0"),
        (dict(weight_mode="split"), "`weight_mode` must be one of.*'split'"),
    ],
)
def test_config_errors(tmp_path, change, message):
    folder = write_folder(tmp_path / "hf", hugging_face(), CONFIG | change)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_config_that_is_no_json_is_named(tmp_path):
    folder = write_folder(tmp_path / "hf", {})
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="hf': config.json must hold JSON"):
        load(folder)


def test_config_comes_back(tmp_path):
    factors = dict(qk_dim_factor=0.51, v_dim_factor=0.75, ffn_proj_factor=1.3)
    config = CONFIG | factors | dict(ffn_round_up_to_multiple_of=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    lm = load(str(tmp_path), load_weights=False)
    cell = lm.backbone.stack.blocks[0].mixer.cell
    assert (cell.key_dim, cell.value_dim) == (6, 9)  # 0.51 x 24 = 12.24, cut off to 12
    lm.export_to_transformers(str(tmp_path / "back"))
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: back[key] for key in config} == config
    assert (back["num_blocks"], back["embedding_dim"], back["dtype"]) == (2, D, "float32")
    assert back["eos_token_id"] is None


def test_transformers_opens_no_model_without_soft_caps(tmp_path):
    lm = XLSTMCausalLM(XLSTMBackbone(V, 1, 16, 2), logit_soft_cap=None)
    with pytest.raises(ValueError, match="`output_logit_soft_cap` must be a number.*None"):
        lm.export_to_transformers(str(tmp_path))
    with pytest.raises(ValueError, match="`gate_soft_cap` must be a number.*None"):
        XLSTMBackbone(V, 1, 16, 2, gate_soft_cap=None).export_to_transformers(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_only_large_models_leave_for_transformers(tmp_path):
    for kwargs in (dict(block_style="original"), dict(slstm_at=[0])):
        backbone = XLSTMBackbone(V, 1, 16, 2, **kwargs)
        with pytest.raises(ValueError, match="large blocks without sLSTM only.*block_style="):
            backbone.export_to_transformers(str(tmp_path))


def test_the_7b_model_has_a_place_for_each_of_its_parameters():
    """Built without a number in memory."""
    config = transformers.backbone_config({"model_type": "xlstm"})
    names = ("num_heads", "qk_dim_factor", "v_dim_factor", "ffn_dim_factor", "ffn_round_up_to")
    with keras.StatelessScope(initialize_variables=False):
        stack = kx.layers.XLSTMBlockStack(
            config["num_layers"], block_style="large", **{name: config[name] for name in names}
        )
        stack.build((None, None, config["hidden_dim"]))
        embedding = keras.layers.ReversibleEmbedding(
            config["vocabulary_size"], config["hidden_dim"], tie_weights=False
        )
        embedding.build()
    model = types.SimpleNamespace(stack=stack, token_embedding=embedding)
    keras.utils.clear_session()  # else the next scope to end would draw these numbers after all
    variables = {id(v) for layer in (stack, embedding) for v in layer.trainable_variables}
    for fused in (False, True):
        table = large.table(model, transformers.EMBEDDING, fused=fused)
        keys = [weight.key for weight in table]
        assert len(set(keys)) == len(keys) == 3 + 32 * (9 if fused else 15)
        assert sum(math.prod(weight.shape) for weight in table) == 6_865_424_896
        parts = [id(getattr(layer, name)) for weight in table for layer, name, _ in weight.parts]
        assert len(parts) == len(set(parts)) and set(parts) == variables


# === What is refused ===


def broken(kind, arrays, folder):
    """Breaks a checkpoint; returns what the error must say, in order."""
    key, path = "backbone.blocks.1.ffn.proj_up.weight", folder / "model.safetensors"
    config = dict(CONFIG)
    if kind == "missing key":
        del arrays[key]
        said = ["model.safetensors", key, "missing", "(64, 24)"]
    elif kind == "extra key":
        arrays["backbone.blocks.2.norm_ffn.weight"] = np.ones(24, "float32")
        said = ["model.safetensors", "blocks.2.norm_ffn.weight", "(24,)", "no place"]
    elif kind == "wrong shape":
        arrays[key] = arrays[key].T.copy()
        said = ["model.safetensors", key, "(24, 64)", "(64, 24)"]
    elif kind == "contradicting config":
        config["hidden_size"] = 48
        said = ["model.safetensors", "backbone.embeddings.weight", "(13, 24)", "(13, 48)", "more."]
    elif kind == "wrong dtype":
        arrays[key] = arrays[key].astype("int32")
        said = ["model.safetensors", key, "F64, F32, F16, BF16", "I32", "(64, 24)"]
    elif kind == "NaN":
        arrays[key][3, 2] = np.nan
        said = ["model.safetensors", key, "(64, 24)", "NaN"]
    elif kind == "infinity":
        arrays[key][3, 2] = -np.inf
        said = ["model.safetensors", key, "(64, 24)", "infinity"]
    write_folder(folder, arrays, config)
    whole = path.read_bytes()
    header = whole[8 : 8 + int.from_bytes(whole[:8], "little")]
    if kind == "truncated":
        path.write_bytes(whole[:-5])
        said = ["model.safetensors", "cut off", str(len(whole)), str(len(whole) - 5)]
    elif kind == "truncated header":
        path.write_bytes(whole[:100])
        said = ["model.safetensors", "cut off", "100 bytes"]
    elif kind == "empty":
        path.write_bytes(b"")
        said = ["model.safetensors", "cut off", "0 bytes"]
    elif kind == "too long":
        path.write_bytes(whole + b"0")
        said = ["model.safetensors", "bytes that its header does not tell of"]
    elif kind == "no header":
        path.write_bytes(len(header).to_bytes(8, "little") + b"x" * (len(whole) - 8))
        said = ["model.safetensors", "not a safetensors file", "header"]
    elif kind == "a name twice":
        text = header.replace(b"proj_up_gate.weight", b"proj_up.weight" + b" " * 0)
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + len(header) :])
        said = ["model.safetensors", "proj_up.weight", "twice"]
    elif kind == "deep header":
        path.write_bytes((10**5).to_bytes(8, "little") + b"[" * 10**5)
        said = ["model.safetensors", "not a safetensors file", "header"]
    elif kind == "overlap":
        content = json.loads(header)
        twin, other = "backbone.blocks.0.ffn.proj_up.weight", "backbone.blocks.1.ffn.proj_up.weight"
        content[twin]["data_offsets"] = content[other]["data_offsets"]
        text = json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + len(header) :])
        said = ["model.safetensors", "must lie at the bytes"]
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"x": Trap()}))
        said = ["model.safetensors", "is a pickle", "weights_only=True"]
    elif kind == "torch file":
        path.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Trap()}))
        said = ["neither model.safetensors nor", "pytorch_model.bin", "weights_only=True"]
    return said


class Trap:
    """Whoever unpickles it is caught."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


BREAKS = """missing key, extra key, wrong shape, contradicting config, wrong dtype, NaN,
infinity, truncated, truncated header, empty, too long, no header, deep header, a name twice,
overlap, pickle, torch file"""


@pytest.mark.parametrize("kind", [kind.strip() for kind in BREAKS.split(",")])
def test_a_malformed_checkpoint_is_refused(tmp_path, kind):
    said = broken(kind, hugging_face(), tmp_path / "hf")
    with pytest.raises(ValueError) as error:
        load(str(tmp_path / "hf"))
    assert re.search(".*".join(map(re.escape, said)), str(error.value), re.DOTALL), error.value


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(vocab_size=10**12),
            r'"backbone.embeddings.weight" has the shape \(13, 24\).*10{12}, 24',
        ),
        (
            dict(hidden_size=10**12),
            r'"backbone.embeddings.weight" has the shape \(13, 24\).*13, 10{12}',
        ),
        (
            dict(num_hidden_layers=10**9),
            r"model.safetensors: .* 10{9} blocks. Received: 33 tensors",
        ),
    ],
)
def test_no_memory_is_asked_for_that_the_files_cannot_fill(tmp_path, change, message):
    folder = write_folder(tmp_path / "hf", hugging_face(), CONFIG | change)
    with pytest.raises(ValueError, match=message):
        load(folder)
    tensors = hugging_face()
    tensors["embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    with pytest.raises(ValueError, match=r"embedding.weight.*\(13, 24\).*\(50304, 4096\)"):
        from_xlstm(tensors, {})


def test_numbers_are_converted_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "PIECE", 7)
    arrays = {"a": some("a", (5, 6)), "b": some("b", (3,)), "c": np.float32(4).reshape(())}
    write_file(tmp_path / "x.safetensors", arrays)
    for key, tensor in safetensors.read_header(str(tmp_path / "x.safetensors")).items():
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            x = tensor.read(np.dtype(dtype))
            assert x.dtype == dtype
            np.testing.assert_array_equal(x, arrays[key].astype(dtype))


def test_numbers_beyond_the_range_of_float16_are_refused(tmp_path):
    arrays = hugging_face()
    arrays["backbone.blocks.1.ffn.proj_up.weight"][3, 2] = 1e5
    folder = write_folder(tmp_path / "hf", arrays)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.proj_up.weight.*\(64, 24\).*as float16"):
        load(folder, dtype="float16")
    load(folder, dtype="bfloat16")


@pytest.mark.parametrize("kind", ["missing key", "wrong shape"])
def test_nothing_is_assigned_unless_all_fits(tmp_path, kind):
    broken(kind, hugging_face(), tmp_path / "hf")
    backbone = XLSTMBackbone.from_preset(str(tmp_path / "hf"), load_weights=False)
    before = [numpy(v) for v in backbone.variables]
    tensors = safetensors.read_header(str(tmp_path / "hf" / "model.safetensors"))
    with pytest.raises(ValueError, match="Nothing was loaded"):
        weights.load(large.table(backbone, transformers.EMBEDDING), tensors, "config.json")
    for v, x in zip(backbone.variables, before, strict=True):
        np.testing.assert_array_equal(numpy(v), x)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files, key: files.pop(key), 'model-1.safetensors has ".*", which .* lacks there'),
        (lambda files, key: files.update({key: "model-0.safetensors"}), "model-[01].safetensors"),
        (lambda files, key: files.update({key: "none.safetensors"}), "names none.safetensors"),
        (lambda files, key: files.update({key: "../x.safetensors"}), "its own folder.*../x"),
    ],
)
def test_an_index_that_contradicts_its_files_is_refused(tmp_path, change, message):
    folder = write_folder(tmp_path / "hf", hugging_face(), files=2)
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = next(key for key, file in index["weight_map"].items() if file == "model-1.safetensors")
    change(index["weight_map"], key)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_quantized_model_is_not_exported(tmp_path):
    lm = load(write_folder(tmp_path / "hf", hugging_face()))
    lm.backbone.stack.blocks[0].ffn.up.quantize("int8")
    with pytest.raises(ValueError, match="quantized model cannot be converted.*ffn/up.*int8"):
        lm.export_to_transformers(str(tmp_path / "back"))


def test_adapters_are_merged_on_export(tmp_path):
    lm = load(write_folder(tmp_path / "hf", hugging_face()))
    token_ids = np.arange(1, 9)[None]
    lm.backbone.enable_lora(2)
    for v in lm.trainable_variables:
        v.assign(v + 0.1)
    lm.export_to_transformers(str(tmp_path / "back"))
    merged = load(str(tmp_path / "back"))
    assert_close(logits(merged, token_ids), logits(lm, token_ids), 1e-5)


# === The real `transformers` ===

REAL = {
    "plain": dict(vocab_size=97, hidden_size=128, num_hidden_layers=2, num_heads=2),
    "odd": dict(
        vocab_size=53, hidden_size=192, num_hidden_layers=1, num_heads=1, qk_dim_factor=0.334,
        ffn_round_up_to_multiple_of=32, gate_soft_cap=5.0, output_logit_soft_cap=3.0, eps=1e-2,
        norm_eps=1e-3, chunk_size=16,
    ),
    "tied": dict(
        vocab_size=64, hidden_size=128, num_hidden_layers=3, num_heads=4, qk_dim_factor=1.0,
        v_dim_factor=0.5, ffn_proj_factor=1.3, tie_word_embeddings=True,
    ),
}  # fmt: skip


def real_model(name):
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = hf.xLSTMForCausalLM(hf.xLSTMConfig(**REAL[name], autocast_kernel_dtype="float32"))
    with torch.no_grad():
        for key, p in model.named_parameters():
            # Input gates start at -10, which would hide the memory.
            p.add_(0.1 * torch.randn_like(p) + (7.0 if key.endswith("igate_preact.bias") else 0.0))
    return torch, hf, model.eval()


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(x, marks=pytest.mark.long_on_xla) for x in ("plain", "odd"))]
)
def test_transformers_computes_the_same(tmp_path, name):
    torch, hf, theirs = real_model(name)
    theirs.save_pretrained(tmp_path / "hf")
    token_ids = np.random.default_rng(0).integers(0, REAL[name]["vocab_size"], (2, 37))
    with torch.no_grad():
        expected = theirs(torch.tensor(token_ids)).logits.numpy()
    ours = load(str(tmp_path / "hf"))
    assert_close(logits(ours, token_ids), expected)
    assert_close(in_pieces(ours, token_ids, 20), expected)
    ours.export_to_transformers(str(tmp_path / "back"))
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back) is type(theirs)
    for key, x in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], x), key
    with torch.no_grad():
        assert_close(back(torch.tensor(token_ids)).logits.numpy(), expected, 1e-5)


def test_transformers_generates_the_same(tmp_path):
    torch, _, theirs = real_model("plain")
    theirs.save_pretrained(tmp_path / "hf")
    prompt = np.random.default_rng(1).integers(0, 97, (2, 9))
    expected = theirs.generate(
        torch.tensor(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    ours = load(str(tmp_path / "hf"))
    ours.compile(sampler="greedy")
    token_ids, mask = np.zeros((2, 73), "int32"), np.zeros((2, 73), bool)
    token_ids[:, :9], mask[:, :9] = prompt, True
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    got = ours.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(numpy(got), expected.numpy())


# === Tokenizers ===

TEXTS = ["any text at all", "grüße  an\n\n   alle!", "<|endoftext|>a<|padding|>    b", "日本 ✓"]


def neox_tokenizer(folder):
    """A small `tokenizer.json` of GPT-NeoX' kind."""
    from keras_xlstm.models.tokenizer import byte_symbols

    merges = [["a", "n"], ["an", "y"], ["Ġ", "t"], ["Ġt", "e"], ["Ġ", "Ġ"]]
    tokens = ["<|endoftext|>", "<|padding|>", *byte_symbols(), *map("".join, merges)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    flags = dict(single_word=False, lstrip=False, rstrip=False)
    added = [
        dict(id=id, content=token, special=id < 2, normalized=id >= 2, **flags)
        for id, token in ((0, tokens[0]), (1, tokens[1]), (len(tokens), "   "))
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: id for id, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return content


def test_tokenizer_comes_with_the_model(tmp_path):
    import tokenizers

    content = neox_tokenizer(tmp_path)
    write_folder(tmp_path, hugging_face())
    for load_tokenizer in (XLSTMTokenizer.from_preset, keras_hub.tokenizers.Tokenizer.from_preset):
        tokenizer = load_tokenizer(str(tmp_path))
        assert type(tokenizer) is XLSTMTokenizer
    assert tokenizer.vocabulary_size() == len(content["model"]["vocab"]) + 1
    assert (tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    original = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.export_to_transformers(str(tmp_path / "back"))
    back = tokenizers.Tokenizer.from_file(str(tmp_path / "back" / "tokenizer.json"))
    for text in TEXTS:
        expected = original.encode(text).ids
        assert np.asarray(tokenizer(text)).tolist() == expected, text
        assert back.encode(text).ids == expected, text
    with pytest.raises(ValueError, match="no ids beyond .* 264 tokens, vocabulary_size=13"):
        XLSTMCausalLM.from_preset(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["vocab_size"] = tokenizer.vocabulary_size()
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    lm = XLSTMCausalLM.from_preset(str(tmp_path), load_weights=False)
    assert type(lm.preprocessor) is XLSTMCausalLMPreprocessor
    assert np.asarray(lm.preprocessor.generate_preprocess(["any"])["token_ids"])[0, 0] == 0


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    content = neox_tokenizer(tmp_path)
    write_folder(tmp_path, hugging_face())
    content["model"]["type"] = "WordPiece"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="must hold a model of type BPE.*WordPiece"):
        XLSTMTokenizer.from_preset(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json.*preprocessor=None"):
        XLSTMCausalLM.from_preset(str(tmp_path))


def test_auto_tokenizer_opens_ours(tmp_path):
    hf = pytest.importorskip("transformers")
    tokenizer = XLSTMTokenizer.byte_level()
    lm = XLSTMCausalLM(
        XLSTMBackbone(tokenizer.vocabulary_size(), 1, 16, 2, ffn_round_up_to=8),
        XLSTMCausalLMPreprocessor(tokenizer, sequence_length=8),
    )
    lm.export_to_transformers(str(tmp_path))
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text) == np.asarray(tokenizer(text)).tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[f"{x}_token_id"] for x in ("bos", "eos", "pad")] == [0, 0, 1]


# === The `xlstm` package ===


def recorded(name):
    """Configuration, weights, input and output of a model of the package.

    `xlstm_outputs.json` has shapes and outputs of xlstm 2.0.6 on a CPU, with the weights of `some`.
    """
    entry = RECORDED[name]
    arrays = {key: some(key, shape) for key, shape in entry["shapes"].items()}
    if entry["config"].get("tie_weights"):
        arrays["lm_head.weight"] = arrays["token_embedding.weight"]
    if "vocab_size" in entry["config"]:
        x = np.arange(6)[None] * 3 % entry["config"]["vocab_size"]
    else:
        x = some("input", (1, 6, entry["config"]["embedding_dim"]))
    return entry["config"], arrays, x, np.array(entry["output"], "float32")


def output(model, x):
    return numpy(model(x)) if x.ndim == 3 else logits(model, x)


@pytest.mark.parametrize("name", RECORDED)
def test_the_xlstm_package_computes_the_same(tmp_path, name):
    config, arrays, x, expected = recorded(name)
    ours = from_xlstm(arrays, config)
    assert_close(output(ours, x), expected)
    if x.ndim == 2:
        assert_close(in_pieces(ours, x, 3), expected)
    to_xlstm(ours, str(tmp_path))
    again = from_xlstm(str(tmp_path))
    assert_close(output(again, x), expected)
    back = read_file(tmp_path / "model.safetensors")
    if config.get("weight_mode") != "fused":  # the package's own loader knows single ones only
        assert_same(back, arrays)


@pytest.mark.parametrize("name", [name for name in RECORDED if "slstm" in name])
def test_both_layouts_of_the_slstm(tmp_path, name):
    config, arrays, x, expected = recorded(name)
    to_xlstm(from_xlstm(arrays, config), str(tmp_path), slstm_layout="cuda")
    cuda = read_file(tmp_path / "model.safetensors")
    kernels = [key for key in arrays if key.endswith("_recurrent_kernel_")]
    assert kernels
    for key in kernels:
        NH, _, DH = arrays[key].shape
        expected_kernel = arrays[key].reshape(NH, 4, DH, DH).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(cuda[key], expected_kernel.reshape(NH, DH, 4 * DH))
        bias = key.replace("_recurrent_kernel_", "_bias_")
        expected_bias = arrays[bias].reshape(4, NH, DH).transpose(1, 0, 2)
        np.testing.assert_array_equal(cuda[bias], expected_bias.reshape(-1))
    assert_close(output(from_xlstm(str(tmp_path)), x), expected)


def test_states_of_the_xlstm_package():
    config, arrays, x, expected = recorded("slstm and mlstm")
    ours = from_xlstm(arrays, config)
    _, state = ours(x[:, :4], return_state=True)
    theirs = state_to_xlstm(ours, state)
    C, n, m = theirs["block_0"]["mlstm_state"]
    B, NH, DH = C.shape[:3]
    assert (C.shape, n.shape, m.shape) == ((B, NH, DH, DH), (B, NH, DH, 1), (B, NH, 1, 1))
    np.testing.assert_allclose(C * math.sqrt(DH), numpy(state[0][1]), rtol=1e-6)
    assert theirs["block_0"]["conv_state"][0].shape == (B, 4, NH * DH)
    assert theirs["block_1"]["slstm_state"].shape == (4, B, config["embedding_dim"])
    y = ours(x[:, 4:], initial_state=state_from_xlstm(ours, theirs))
    assert_close(numpy(y), expected[:, 4:])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bias=True), "`bias` must be False"),
        (dict(add_post_blocks_norm=False), "`add_post_blocks_norm` must be True"),
        (dict(slstm_block={"feedforward": None}), "must have a `feedforward`"),
        (dict(slstm_block={"feedforward": {"act_fn": "relu"}}), "`act_fn` must be 'gelu'"),
        (dict(num_blocks=4), '"blocks.3.* is missing'),
        (dict(slstm_at="some"), "`slstm_at` must be a list of layer indices.*'some'"),
        (dict(slstm_block=[1]), r"`slstm_block` must hold names and values.*\[1\]"),
    ],
)
def test_xlstm_config_errors(change, message):
    config, arrays, *_ = recorded("slstm and mlstm")
    with pytest.raises(ValueError, match=message):
        from_xlstm(arrays, config | change)


def test_no_safetensors_file_is_taken_for_a_pickle(tmp_path):
    """Its length of the header comes first, and may begin as a pickle does."""
    starts = set()
    for length in range(1, 200):
        path = tmp_path / f"{length}.safetensors"
        write_file(path, {"x" * length: np.ones(2, "float32")})
        starts.add(path.read_bytes()[:1])
        assert list(safetensors.read_header(path)) == ["x" * length]
    assert b"\x80" in starts


def test_the_package_can_build_what_is_exported(tmp_path):
    """It needs a length for its masks, and has a convolution in each mLSTM."""
    config, arrays, *_ = recorded("slstm and mlstm")
    to_xlstm(from_xlstm(arrays, config), str(tmp_path), context_length=77)
    assert "context_length: 77\n" in (tmp_path / "config.yaml").read_text()
    stack = kx.layers.XLSTMBlockStack(
        1, num_heads=2, norm_epsilon=1e-5, mlstm_block=dict(conv_kernel_size=0)
    )
    stack.build((None, None, 16))
    with pytest.raises(ValueError, match="`conv_kernel_size` of the mLSTM blocks.*=0"):
        to_xlstm(stack, str(tmp_path / "none"))


def test_sources_of_xlstm_that_are_refused(tmp_path):
    config, arrays, *_ = recorded("slstm and mlstm")
    write_file(tmp_path / "model.safetensors", arrays)
    (tmp_path / "config.yaml").write_text("!!python/object/apply:pytest.fail [a call]")
    with pytest.raises(ValueError, match="config.yaml must hold plain YAML.*python/object"):
        from_xlstm(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="`source` must be.*nowhere"):
        from_xlstm(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="`config` must be a dict.*NoneType"):
        from_xlstm(arrays)
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"x": Trap()}))
    with pytest.raises(ValueError, match="model.pt is a pickle.*weights_only"):
        from_xlstm(str(tmp_path / "model.pt"), config)
    with pytest.raises(ValueError, match="neither model.safetensors nor model_0.safetensors"):
        from_xlstm(str(tmp_path), config)
    tied, arrays, *_ = recorded("tied model")
    arrays["lm_head.weight"] = arrays["lm_head.weight"] + 1
    with pytest.raises(ValueError, match='"lm_head.weight" must equal "token_embedding.weight"'):
        from_xlstm(arrays, tied)
    with pytest.raises(ValueError, match="`slstm_layout` must be one of.*'other'"):
        to_xlstm(None, str(tmp_path), slstm_layout="other")
