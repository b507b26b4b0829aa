"""The examples about scale, at a tiny size: a plan for chips that are not here, a long text."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_xlstm.models import XLSTMBackbone

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SMALL = dict(vocabulary_size=512, num_layers=1, hidden_dim=256, num_heads=2)


def plan(code):
    """What `code` prints beside `scale_plan`, as JSON: in another process, since it asks for TPUs.

    Args:
        code: string, an expression, in which `scale_plan` and `SMALL` are known.
    """
    code = f"import json, scale_plan; SMALL = {SMALL}; print(json.dumps({code}))"
    known = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "KERAS_BACKEND")}
    known |= {"PYTHONPATH": f"{FOLDER}:{known.get('PYTHONPATH', '')}"}
    run = subprocess.run([sys.executable, "-c", code], env=known, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


needs_compiler = pytest.mark.skipif(
    keras.backend.backend() != "jax" or PathFinder.find_spec("libtpu") is None,
    reason="needs JAX and libtpu",
)


TEXT = """
  %a = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %b = (f32[4]{0}, f32[16]{0}) all-gather-start(%y), channel_id=2, replica_groups=[2,2]<=[4]
  %c = f32[10]{0} all-reduce(%z), channel_id=3, replica_groups={{0,1},{2,3}}
  %d = f32[10]{0} collective-permute(%z), channel_id=4, source_target_pairs={{0,1}}
  %e = f32[10]{0} collective-permute(%z), channel_id=4, source_target_pairs={{0,1}}
"""


@needs_compiler
def test_a_train_step_shared_out_over_four_chips():
    step = "scale_plan.Program.of('v5e:2x2', dict(batch=4), 4, 256, SMALL)"
    program, found = plan(f"[{step}, scale_plan.collectives({TEXT!r}, 4)]")
    arguments, temporaries, flops, moved, sent, counts = program
    weights = XLSTMBackbone(**SMALL).count_params()
    # A weight and two slots, in float32; nearly all are matrices, and split.
    np.testing.assert_allclose(arguments, 3 * 4 * weights / 4, rtol=0.02)
    products = 6 * (weights - 512 * 256) * 256  # of a chip's row, forward and twice that backward
    assert products < flops < 2 * products  # blocks are computed again
    assert temporaries > 2 * 256 * 512 and moved > arguments
    # A weight comes in twice, of bfloat16 or float32, and a sum of its gradients goes out.
    assert 2 * 2 * weights * 3 / 4 < sent < 4 * 4 * weights
    assert {"all-gather", "all-reduce"} <= set(counts)
    # Bytes on their way are those of rings.
    assert found == {
        "all-gather": [2, 64 * 3 / 4 + 64 / 2],
        "all-reduce": [1, 2 * 40 / 2],
        "collective-permute": [1, 40],
    }


@needs_compiler
@pytest.mark.long
def test_a_decoding_step_over_heads():
    arguments, _, flops, _, _, counts = plan(
        "scale_plan.Program.of('v5e:2x2', dict(batch=2, model=2), 8, 1, SMALL, decode=True)"
    )
    weights = XLSTMBackbone(**SMALL).count_params()
    state = 4 * 8 * (2 * 64 * 128 + 2 * 64 + 2)  # float32, of 8 rows: C, n, m of two heads
    np.testing.assert_allclose(arguments, 2 * weights / 2 + state / 4, rtol=0.02)
    assert flops > 2 * (weights - 512 * 256) * 4 / 2 and counts["all-reduce"]


@pytest.fixture
def long_context(monkeypatch):
    spec = importlib.util.spec_from_file_location("long_context", FOLDER / "long_context.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = dict(SHORT=8, LONG=64, STREAM=600, PIECE=80, STEPS=4, EDGES=(0, 80, 600))
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    return module


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="would compile for minutes")
def test_long_context(long_context, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    long_context.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| trained")]
    assert len(rows) == 4
    for _, *perplexities in rows:
        assert all(1 < float(x) < 400 for x in perplexities)
    assert Path("long_context.png").read_bytes().startswith(b"\x89PNG")


def test_a_stream_is_read_as_one_text(long_context, monkeypatch):
    lm = long_context.new_model()
    reader, text = long_context.Reader(lm), long_context.load_texts()[1]
    tokens = {"token_ids": text[None], "padding_mask": np.ones_like(text[None])}
    logits = lm.predict(tokens, verbose=0)[0].astype("float64")
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -logs[np.arange(599), text[1:]] / np.log(2)
    bits, memory = reader.bits(text)
    np.testing.assert_allclose(bits, wanted, rtol=1e-4, atol=1e-4)
    assert len(memory) == 8
    afresh = reader.bits_afresh(text)
    np.testing.assert_allclose(afresh[:8], wanted[:8], rtol=1e-4, atol=1e-4)
    later, _ = reader.bits(text[80:])
    np.testing.assert_allclose(afresh[80:88], later[:8], rtol=1e-4, atol=1e-4)
