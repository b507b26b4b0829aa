"""Files that are cut off, damaged, forged or cannot be written: an error, and nothing is lost."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_xlstm import files
from keras_xlstm.converters import from_xlstm, safetensors, to_xlstm
from keras_xlstm.models import (
    XLSTMBackbone,
    XLSTMCausalLM,
    XLSTMCausalLMPreprocessor,
    XLSTMTokenizer,
)

SHARD = 3e-5  # gigabytes a file: several files


def new_model(seed=0, **sizes):
    keras.utils.set_random_seed(seed)
    sizes = dict(num_layers=1, hidden_dim=16, num_heads=2, ffn_round_up_to=8) | sizes
    preprocessor = XLSTMCausalLMPreprocessor(XLSTMTokenizer.byte_level(), sequence_length=8)
    return XLSTMCausalLM(XLSTMBackbone(258, **sizes), preprocessor)


def values(model):
    return [ops.convert_to_numpy(w) for w in model.weights]


def same(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


@pytest.fixture(scope="module")
def model():
    return new_model()


@pytest.fixture(scope="module")
def other():
    return new_model(seed=1)


SAVES = {
    "preset": (lambda m, path, **kw: m.save_to_preset(path, **kw), XLSTMCausalLM.from_preset),
    "transformers": (
        lambda m, path, **kw: m.export_to_transformers(path, **kw),
        XLSTMCausalLM.from_preset,
    ),
    "xlstm": (lambda m, path, **kw: to_xlstm(m, path, **kw), from_xlstm),
}
each_save = pytest.mark.parametrize("kind", SAVES)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@each_save
def test_a_full_disk_leaves_what_stood_there(model, other, tmp_path, kind):
    """The limit of a file's size is the system's own way to refuse a write."""
    save, load = SAVES[kind]
    save(model, tmp_path)
    before, memory = content(tmp_path), values(other)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 20_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            with pytest.raises(OSError, match="Nothing was saved to") as error:
                save(other, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path) in str(error.value)
        assert content(tmp_path) == before
    assert same(values(other), memory)
    assert same(values(load(str(tmp_path))), values(model))
    save(other, tmp_path)
    assert same(values(load(str(tmp_path))), memory)


@each_save
def test_where_nothing_can_be_written_the_error_names_the_place(model, tmp_path, kind):
    (tmp_path / "file").write_text("no folder")  # root may write to read-only folders, not here
    with pytest.raises(OSError, match=r"Nothing was saved to .*file/below"):
        SAVES[kind][0](model, tmp_path / "file" / "below")


@each_save
def test_an_older_save_of_another_form_does_not_come_back(model, other, tmp_path, kind):
    """A reader takes one file before several: the older one must not stay beside the newer."""
    save, load = SAVES[kind]
    save(model, tmp_path)
    save(other, tmp_path, max_shard_size=SHARD)
    assert same(values(load(str(tmp_path))), values(other))
    save(model, tmp_path)
    assert same(values(load(str(tmp_path))), values(model))
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@each_save
def test_a_save_that_stopped_while_it_moved_files_is_finished(
    model, other, tmp_path, kind, monkeypatch
):
    save, load = SAVES[kind]
    for stop in (0, 1, 2):
        folder = tmp_path / str(stop)
        save(model, folder)
        moves, replace = [], Path.replace

        def stopping(path, place, moves=moves, stop=stop, replace=replace):
            if files.SAVED in path.parts and files.SAVING not in path.parts:
                moves.append(path)
                if len(moves) > stop:
                    raise KeyboardInterrupt
            return replace(path, place)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stopping)
            with pytest.raises(KeyboardInterrupt):
                save(other, folder, max_shard_size=SHARD)
        assert same(values(load(str(folder))), values(other))


KILLED = """
import os, sys, threading, time
from pathlib import Path
from keras_xlstm.files import saving
sys.stdout.write("ready"); sys.stdout.flush()
for n in range(10**6):
    with saving(sys.argv[1]) as folder:
        for name in "abcdefgh":
            Path(folder, name).write_text(str(n) * 2000)
"""


@pytest.mark.parametrize(
    "kills", [pytest.param(3, id="few"), pytest.param(60, id="many", marks=pytest.mark.long)]
)
def test_a_killed_save_leaves_the_old_files_or_the_new_ones(tmp_path, kills):
    rng, seen = np.random.default_rng(), set()
    code = Path(files.__file__).read_text() + KILLED.replace(
        "from keras_xlstm.files import saving", ""
    )
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
        process.stdout.read(5)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05 + 0.1 * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        files.finish(tmp_path)
        texts = {(tmp_path / name).read_text() for name in "abcdefgh"}
        assert len(texts) == 1 and len(texts.pop()) >= 2000
        seen.add((tmp_path / files.SAVING).exists())
    assert kills < 10 or True in seen  # it was killed while it wrote


def test_links_are_replaced_and_not_written_through(model, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "save"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(victim)
    model.export_to_transformers(folder)
    assert victim.read_text() == "precious"


def test_other_files_of_the_folder_stay(model, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "adapter.safetensors").write_text("mine too")
    model.save_to_preset(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "adapter.safetensors").read_text() == "mine too"


def test_lora_weights_are_saved_whole_or_not_at_all(tmp_path):
    model, path = new_model(), tmp_path / "x.lora.h5"
    model.backbone.enable_lora(2)
    model.backbone.save_lora_weights(path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"x\.lora\.h5"):
            model.backbone.save_lora_weights(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.lora.h5"]


def damaged(whole, rng):
    """Cut off at a random byte, or with a random bit turned."""
    data = bytearray(whole)
    if rng.random() < 0.5:
        return bytes(data[: rng.integers(len(data))])
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(data)


@pytest.mark.parametrize("count", [40, pytest.param(5000, marks=pytest.mark.long)])
def test_a_damaged_safetensors_file_is_refused_or_has_the_same_tensors(tmp_path, count):
    """A turned bit of a number cannot be seen, for lack of a checksum. All else is."""
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    arrays = {"a": np.ones((2, 3), "float32"), "b": np.zeros(5, "float32")}
    safetensors.write(path, {k: (x.dtype, x.shape) for k, x in arrays.items()}, arrays.values())
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(count):
        new = damaged(whole, rng)
        path.write_bytes(new)
        try:
            tensors = safetensors.read_header(path)
        except ValueError as e:
            assert "x.safetensors" in str(e)
            continue
        assert len(new) == len(whole)  # never cut off
        assert all(x.offset >= 8 and x.offset + x.nbytes <= len(new) for x in tensors.values())
        if new[:data] == whole[:data]:
            assert {k: x.shape for k, x in tensors.items()} == {"a": (2, 3), "b": (5,)}


def with_header(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


LIES = {
    "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "offsets beyond the file": with_header(entry(data_offsets=[0, 1 << 60]), bytes(8)),
    "offsets below zero": with_header(entry(data_offsets=[-8, 8]), bytes(8)),
    "no offsets": with_header(entry(data_offsets=[]), bytes(8)),
    "infinite offsets": with_header(entry(data_offsets=[0, float("inf")]), bytes(8)),
    "sizes below zero": with_header(entry(shape=[-1, -2]), bytes(8)),
    "a broken size": with_header(entry(shape=[2.7]), bytes(8)),
    "a size in words": with_header(entry(shape="2"), bytes(8)),
    "a truth for a size": with_header(entry(shape=[True, 2]), bytes(8)),
    "a huge size": with_header(entry(shape=[1 << 62, 1 << 62]), bytes(8)),
    "overlapping tensors": with_header(
        entry() | {"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)
    ),
    "a list": with_header([1], bytes(8)),
    "no UTF-8": with_header(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    path = tmp_path / "x.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        safetensors.read_header(path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "..", ".", "", "x.bin"])
def test_an_index_names_files_of_its_own_folder(model, tmp_path, name):
    model.export_to_transformers(tmp_path, max_shard_size=SHARD)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files of its own folder"):
        XLSTMCausalLM.from_preset(str(tmp_path))


@pytest.mark.parametrize("count", [12, pytest.param(300, marks=pytest.mark.long)])
def test_damaged_weights_of_a_preset(model, tmp_path, count):
    """HDF5 has no checksum: a turned bit in a number is not seen. Errors name the file."""
    model.backbone.save_to_preset(tmp_path)
    path, rng, refused = tmp_path / "model.weights.h5", np.random.default_rng(0), 0
    whole = path.read_bytes()
    for _ in range(count):
        new = damaged(whole, rng)
        path.write_bytes(new)
        try:
            loaded = XLSTMBackbone.from_preset(str(tmp_path))
        except (OSError, ValueError) as e:
            assert "model.weights.h5" in str(e)
            refused += 1
        else:
            assert len(new) == len(whole)
            assert [v.shape for v in loaded.variables] == [
                v.shape for v in model.backbone.variables
            ]
    assert refused >= count // 4


def test_weights_of_another_model_are_refused(model, tmp_path):
    larger = new_model(hidden_dim=24)
    model.save_to_preset(tmp_path / "a")
    larger.save_to_preset(tmp_path / "b")
    shutil.copy(tmp_path / "a" / "model.weights.h5", tmp_path / "b")
    with pytest.raises(ValueError, match=r"model\.weights\.h5"):
        XLSTMCausalLM.from_preset(str(tmp_path / "b"))


VOCABULARIES = {
    "twice the same id": '{"a": 0, "b": 0}',
    "below zero": '{"a": -1, "b": 0}',
    "a fraction": '{"a": 0.5, "b": 0}',
    "a list": '["a", "b"]',
    "cut off": '{"a": 0, "b"',
    "empty": "",
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_damaged_vocabulary_is_refused(tmp_path, kind):
    XLSTMTokenizer.byte_level().save_to_preset(tmp_path)
    new_model().backbone.save_to_preset(tmp_path)
    assets = tmp_path / "assets" / "tokenizer"
    (assets / "vocabulary.json").write_text(VOCABULARIES[kind])
    with pytest.raises(ValueError, match=r"assets.*vocabulary\.json"):
        XLSTMTokenizer.from_preset(str(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"type": "BPE"}', "[" * 10**5])
def test_a_damaged_tokenizer_file_is_refused(model, tmp_path, text):
    model.export_to_transformers(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        XLSTMTokenizer.from_preset(str(tmp_path))


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_a_file_is_executed(model, tmp_path):
    caught, preset = tmp_path / "caught", tmp_path / "preset"
    trap = pickle.dumps(Trap(caught))
    model.export_to_transformers(preset)
    (preset / "model.safetensors").write_bytes(trap)
    with pytest.raises(ValueError, match="pickle"):
        XLSTMCausalLM.from_preset(str(preset))
    (preset / "model.safetensors").unlink()
    (preset / "pytorch_model.bin").write_bytes(trap)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
        XLSTMCausalLM.from_preset(str(preset))
    shutil.rmtree(preset)
    model.save_to_preset(preset)
    (preset / "model.weights.h5").write_bytes(trap)
    with pytest.raises(OSError, match=r"model\.weights\.h5"):
        XLSTMCausalLM.from_preset(str(preset))
    assert not caught.exists()


def test_a_preset_runs_no_code_of_its_own(model, tmp_path, monkeypatch):
    caught = tmp_path / "caught"
    (tmp_path / "evil_module.py").write_text(f"open({str(caught)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"module": "evil_module", "class_name": "Evil", "config": {}, "registered_name": "E"}
    model.save_to_preset(tmp_path / "a")
    task = tmp_path / "a" / "task.json"
    content = json.loads(task.read_text())
    content["config"]["preprocessor"] = config
    task.write_text(json.dumps(content))
    with pytest.raises((TypeError, ValueError)):
        XLSTMCausalLM.from_preset(str(tmp_path / "a"))
    unsafe = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x)])
    unsafe.save(tmp_path / "x.keras")
    with pytest.raises(ValueError, match="safe_mode|unsafe"):
        keras.models.load_model(tmp_path / "x.keras")
    assert not caught.exists()
