"""How the fastest of a few plans is found and kept, with a clock that the tests turn."""

import json

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("Triton serves torch", allow_module_level=True)
import torch
from keras_xlstm_triton import autotune, mlstm

PLANS = [[64, 1], [64, 2], [32, 1]]


class Bench:
    """Plans that take so many seconds each, and what was timed."""

    def __init__(self, *seconds, compiling=0.0):
        self.takes = dict(zip(map(tuple, PLANS), seconds, strict=True))
        self.compiling, self.now, self.timed = compiling, 0.0, []

    def run(self, plan):
        self.timed.append(plan)
        return self.takes[tuple(plan)]

    def seconds(self, run):
        self.now += self.compiling
        return run()

    def choose(self, key="key", run=True):
        run = self.run if run else None
        return autotune.choose(key, PLANS, run, self.seconds, lambda: self.now)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_XLSTM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERAS_XLSTM_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_chosen", {})
    return tmp_path / "cache" / "autotune.json"


def test_the_fastest_is_chosen_and_kept(cache, monkeypatch):
    first = Bench(3, 1, 2)
    assert first.choose() == PLANS[1] and first.timed == PLANS
    assert first.choose() == PLANS[1] and first.timed == PLANS  # timed once
    assert json.loads(cache.read_text()) == {"key": PLANS[1]}

    monkeypatch.setattr(autotune, "_chosen", {})  # as in another process
    second = Bench(1, 2, 3)
    assert autotune.known("key", PLANS) == PLANS[1]
    assert second.choose() == PLANS[1] and not second.timed
    assert second.choose("other") == PLANS[0]
    assert json.loads(cache.read_text()) == {"key": PLANS[1], "other": PLANS[0]}
    assert [x.name for x in cache.parent.iterdir()] == ["autotune.json"]


def test_a_process_stays_with_its_choice(cache):
    bench = Bench(3, 1, 2)
    assert bench.choose(run=False) == PLANS[0]  # such as within a CUDA graph
    assert bench.choose() == PLANS[0] and not bench.timed
    assert not cache.exists()
    assert autotune.known("key", PLANS) == PLANS[0]


def test_it_can_be_switched_off(cache, monkeypatch):
    Bench(3, 1, 2).choose()
    monkeypatch.setenv("KERAS_XLSTM_AUTOTUNE", "0")
    bench = Bench(3, 1, 2)
    assert bench.choose() == bench.choose("other") == PLANS[0] and not bench.timed
    assert autotune.known("key", PLANS) == PLANS[0]


def test_it_ends(cache):
    bench = Bench(3, 2, 1, compiling=70.0)
    assert bench.choose() == PLANS[1] and bench.timed == PLANS[:2]


@pytest.mark.parametrize("compiling", [0.1, 10.0])
def test_it_talks_where_it_takes_long(caplog, compiling):
    Bench(3, 2, 1, compiling=compiling).choose()
    assert ("times 3 plans for key" in caplog.text) == (compiling > 2)
    assert not caplog.text or "KERAS_XLSTM_AUTOTUNE=0" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"key": 7}', '{"key": [5, 5]}', b"\xff\xfe", '{"key": null}']
)
def test_a_broken_file_is_written_anew(cache, text):
    cache.parent.mkdir()
    cache.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert Bench(3, 1, 2).choose() == PLANS[1]
    assert json.loads(cache.read_text())["key"] == PLANS[1]


def test_a_folder_that_cannot_be_written_breaks_no_call(cache, caplog):
    cache.parent.write_text("a file where the folder would be")
    bench = Bench(3, 1, 2)
    assert bench.choose() == PLANS[1] == bench.choose()
    assert bench.timed == PLANS and "cannot keep" in caplog.text


def test_a_plan_that_lacks_memory_is_not_chosen():
    def run():
        raise torch.OutOfMemoryError

    assert autotune.seconds_on_gpu(run) == float("inf")


def test_only_large_calls_on_a_gpu_have_a_choice(monkeypatch):
    """On meta tensors with the device's name changed: nothing is computed."""
    q = torch.empty(8, 8192, 8, 256, device="meta", dtype=torch.bfloat16)
    _, plans, _ = mlstm.choices(q, q, None)
    assert len(plans) == 1

    class OnGPU:
        shape, dtype, device = q.shape, q.dtype, torch.device("cuda")

    monkeypatch.setattr(mlstm, "triton_version", lambda: "3")
    monkeypatch.setattr(mlstm.Device, "of", lambda x: mlstm.Device())
    sizes, plans, key = mlstm.choices(OnGPU, OnGPU, None)
    assert 1 < len(plans) <= 6 and "bfloat16 256x256 H100 triton 3" in key
    assert plans[0] == mlstm.flat(mlstm.plan(*sizes)[2:])
    assert all(mlstm.flat(mlstm.tiles_in(plan)) == plan for plan in plans)
    assert "the first call times" in mlstm.how(OnGPU, OnGPU, OnGPU, chunk_size=None)
    autotune._chosen[key] = 1
    assert "as it was timed" in mlstm.how(OnGPU, OnGPU, OnGPU, chunk_size=None)
    for shape, chunk_size in ((8, 512, 4, 64), None), ((8, 8192, 8, 256), 64):
        OnGPU.shape = shape
        assert len(mlstm.choices(OnGPU, OnGPU, chunk_size)[1]) == 1
