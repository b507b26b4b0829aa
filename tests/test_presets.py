"""Saving: presets and `.keras` files come back as they were, under each backend."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

STYLES = ("large", "original")
BACKENDS = ("jax", "tensorflow", "torch")
TOKEN_IDS = np.random.default_rng(0).integers(2, 258, (2, 11)).astype("int32")


def logits(model):
    inputs = {"token_ids": TOKEN_IDS, "padding_mask": np.ones_like(TOKEN_IDS)}
    return ops.convert_to_numpy(model(inputs))


@pytest.fixture(scope="module")
def models():
    keras.utils.set_random_seed(0)
    models, noise = {}, np.random.default_rng(0)
    for style in STYLES:
        tokenizer = XLSTMTokenizer.byte_level()
        backbone = XLSTMBackbone(
            tokenizer.vocabulary_size(),
            num_layers=2,
            hidden_dim=16,
            num_heads=2,
            ffn_round_up_to=8,
            slstm_at=(1,),
            block_style=style,
            tie_embeddings=style == "original",
            chunk_size=4,
        )
        for w in backbone.trainable_variables:
            w.assign(w + 0.2 * noise.normal(size=w.shape))
        preprocessor = XLSTMCausalLMPreprocessor(tokenizer, sequence_length=20, add_end_token=False)
        models[style] = XLSTMCausalLM(backbone, preprocessor, logit_soft_cap=5.0)
        models[style].compile(sampler="greedy")
    return models


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    np.save(folder / "token_ids.npy", TOKEN_IDS)
    for style, model in models.items():
        model.save_to_preset(str(folder / style))
        model.save(folder / f"{style}.keras")
    return folder


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("load", [XLSTMCausalLM.from_preset, keras_hub.models.CausalLM.from_preset])
def test_language_model_from_a_preset(models, folder, style, load):
    model, loaded = models[style], load(str(folder / style))
    assert type(loaded) is XLSTMCausalLM
    assert loaded.get_config() == model.get_config()
    assert loaded.logit_soft_cap == 5.0
    np.testing.assert_array_equal(logits(loaded), logits(model))
    loaded.compile(sampler="greedy")
    prompts = ["one", "and another"]
    assert loaded.generate(prompts) == model.generate(prompts)


def test_parts_from_a_preset(models, folder):
    model, preset = models["large"], str(folder / "large")
    for load in (XLSTMBackbone.from_preset, keras_hub.models.Backbone.from_preset):
        backbone = load(preset)
        assert type(backbone) is XLSTMBackbone
        np.testing.assert_array_equal(logits(backbone), logits(model.backbone))
    untrained = XLSTMBackbone.from_preset(preset, load_weights=False)
    assert np.abs(logits(untrained) - logits(model.backbone)).max() > 0.01
    half = XLSTMBackbone.from_preset(preset, dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(half(half.input).dtype) == "bfloat16"
    tokenizer = XLSTMTokenizer.from_preset(preset)
    assert tokenizer.vocabulary == model.preprocessor.tokenizer.vocabulary
    assert tokenizer.pad_token_id == 1
    assert tokenizer.detokenize(tokenizer("grüße <|padding|>")) == "grüße <|padding|>"
    preprocessor = XLSTMCausalLMPreprocessor.from_preset(preset)
    assert (preprocessor.sequence_length, preprocessor.add_end_token) == (20, False)


def test_parts_save_their_own_presets(models, tmp_path):
    model, preset = models["large"], str(tmp_path)
    model.backbone.save_to_preset(preset)
    model.preprocessor.tokenizer.save_to_preset(preset)
    loaded = XLSTMCausalLM.from_preset(preset)
    assert loaded.preprocessor.tokenizer.get_config()["unsplittable_tokens"]
    np.testing.assert_array_equal(logits(loaded.backbone), logits(model.backbone))


@pytest.mark.parametrize("name", ["xlstm_tiny", "xlstm_tiny_original"])
@pytest.mark.parametrize("cls", [XLSTMCausalLM, keras_hub.models.CausalLM])
def test_tiny_builtin_presets(cls, name):
    model = cls.from_preset(name, load_weights=False)
    assert type(model) is XLSTMCausalLM
    assert model.backbone.count_params() == cls.presets[name]["metadata"]["params"]
    assert logits(model).shape == (2, 11, 258)
    tokenizer = XLSTMTokenizer.from_preset(name)
    assert tokenizer.detokenize(tokenizer("bytes")) == "bytes"
    with pytest.raises(FileNotFoundError, match="model.weights"):
        cls.from_preset(name)


def test_the_7b_preset_opens_the_hub(monkeypatch, tmp_path):
    """The hub's answers stand for the download, which tests do not make."""
    asked, config = [], {"model_type": "xlstm", "num_hidden_layers": 1, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_heads": 2, "vocab_size": 9}))

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return tmp_path / filename

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    backbone = keras_hub.models.Backbone.from_preset("xlstm_7b", load_weights=False)
    assert (type(backbone), backbone.hidden_dim) == (XLSTMBackbone, 64)
    assert set(asked) == {("NX-AI/xLSTM-7b", "config.json")}
    assert XLSTMBackbone.presets["xlstm_7b"]["metadata"]["params"] == 6_865_424_896


def test_upload_of_a_preset(monkeypatch, models, folder):
    """Up to the network: KerasHub checks the folder, and all files that a load needs are sent."""
    sent = {}
    monkeypatch.setattr(
        "huggingface_hub.create_repo",
        lambda repo_id, exist_ok: types.SimpleNamespace(repo_id=repo_id),
    )
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repo_id, filename: False)

    def upload(repo_id, folder_path):
        files = pathlib.Path(folder_path).iterdir()
        sent[repo_id] = {path.name: path.read_bytes() for path in files if path.is_file()}

    monkeypatch.setattr("huggingface_hub.upload_folder", upload)
    copy = shutil.copytree(folder / "large", folder / "copy", dirs_exist_ok=True)
    keras_hub.upload_preset("hf://someone/xlstm", str(copy))
    files = sent["someone/xlstm"]
    assert {"config.json", "model.weights.h5", "task.json", "tokenizer.json"} <= set(files)
    metadata = json.loads(files["metadata.json"])
    assert metadata["parameter_count"] == models["large"].count_params()
    assert metadata["tasks"] == ["CausalLM"]
    assert b"XLSTM" in files["README.md"]


@pytest.mark.parametrize("style", STYLES)
def test_language_model_from_a_keras_file(models, folder, style):
    loaded = keras.models.load_model(folder / f"{style}.keras")
    assert type(loaded) is XLSTMCausalLM
    np.testing.assert_array_equal(logits(loaded), logits(models[style]))
    loaded.compile(sampler="greedy")
    assert loaded.generate("one") == models[style].generate("one")


@pytest.mark.long_on_xla
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != keras.backend.backend()])
def test_another_backend_loads_the_same_logits(models, folder, backend):
    script = pathlib.Path(__file__).with_name("other_backend.py")
    env = os.environ | {"KERAS_BACKEND": backend}
    run = subprocess.run(
        [sys.executable, script, folder], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    got = np.load(folder / f"{backend}.npz")
    assert set(got) == {f"{style}_{kind}" for style in STYLES for kind in ("preset", "keras")}
    for name in got:
        expected = logits(models[name.split("_")[0]])
        # Relative to the largest logit: 1e-5 is some tens of float32 roundings.
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
