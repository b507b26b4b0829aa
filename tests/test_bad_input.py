"""Wrong arguments: `bad_input.txt` is the table of calls and of the message that each gets.

Every backend is held to one table. A message names the argument and says what came, and comes
before any kernel has run.
"""

import functools
import re
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_xlstm
from keras_xlstm import converters, inspect, kernels, layers, models, ops, utils

TABLE = Path(__file__).with_name("bad_input.txt").read_text("utf-8")
ROWS = re.findall(r"^>>> (.+)\n(\w+): (.+)$", TABLE, flags=re.MULTILINE)
B, S, D = 2, 6, 8


def z(*shape):
    return np.zeros(shape, "float32")


@functools.cache
def names():
    """What the calls of the table may name."""
    found = {"keras": keras, "kx": keras_xlstm, "np": np, "z": z, "B": B, "S": S, "D": D}
    found |= {"kernels": kernels, "inspect": inspect, "utils": utils, "ops": ops}
    for module in (ops, layers, models, converters):
        found |= {name: getattr(module, name) for name in module.__all__}
    found |= {"nan": float("nan"), "inf": float("inf"), "x": z(B, S, D)}
    found |= {"q": z(B, S, 2, 4), "k": z(B, S, 2, 4), "v": z(B, S, 2, 4)}
    found |= {"i": z(B, S, 2), "f": z(B, S, 2), "mask": np.ones((B, S), bool)}
    found |= {"C": z(B, 2, 4, 4), "n": z(B, 2, 4), "m": z(B, 2), "h": z(B, 2, 4)}
    found |= {"gates": z(B, S, 4, 2, 4), "R": z(2, 4, 4, 4), "bias": z(4, 2, 4)}

    built = {
        "mlstm_layer": layers.MLSTM(8, 2),
        "slstm_layer": layers.SLSTM(8, 2),
        "large": layers.XLSTMLargeBlock(2),
        "mblock": layers.MLSTMBlock(2),
        "sblock": layers.SLSTMBlock(2),
        "stack": layers.XLSTMBlockStack(2, 2, slstm_at=(1,), norm_epsilon=1e-5),
        "conv": layers.CausalConv1D(4),
    }
    for layer in built.values():
        layer.build((B, S, D))
    tokenizer = models.XLSTMTokenizer.byte_level()
    preprocessor = models.XLSTMCausalLMPreprocessor(tokenizer, sequence_length=8)
    backbone = models.XLSTMBackbone(258, 2, 8, 2, slstm_at=(1,), name="xlstm_backbone")
    built |= {
        "tok": tokenizer,
        "pre": preprocessor,
        "bb": backbone,
        "small": models.XLSTMBackbone(100, 1, 8, 2),
        "lm": models.XLSTMCausalLM(backbone, preprocessor),
        "bare": models.XLSTMCausalLM(backbone),
        "other": models.XLSTMCausalLM(models.XLSTMBackbone(258, 2, 16, 2)),
    }
    ids = np.full((B, S), 5, "int32")
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    built |= {"ids": ids, "inputs": inputs, "MI": lambda **other: inputs | other}
    built["cache"] = built["lm"].call_with_cache(ids, None)[2]
    return found | built | {"dev": ["cpu:0"]}


@pytest.mark.parametrize("code, kind, message", ROWS, ids=[row[0] for row in ROWS])
def test_what_a_wrong_argument_is_told(code, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran, known = [], dict(names())
    with pytest.raises(Exception) as caught, kernels.observe(lambda op, args: ran.append(op)):
        eval(code, known)
    assert caught.type.__name__ == kind
    text = str(caught.value)
    if inner := re.search("\x1b\\[1m(.*?)\x1b\\[0m", text, flags=re.DOTALL):
        text = inner[1]  # of what Keras writes around an error in `call`
    pattern = ".*".join(map(re.escape, message.split("...")))
    assert re.fullmatch(pattern, text, flags=re.DOTALL), text
    assert not ran  # no kernel of any operation
    assert not list(tmp_path.iterdir())  # and no file


def test_the_table_has_the_form_of_the_house():
    assert len(ROWS) > 350 and len(ROWS) == TABLE.count(">>> ")
    assert len({code for code, *_ in ROWS}) == len(ROWS)
    for code, kind, message in ROWS:
        assert kind in ("ValueError", "TypeError"), code
        assert re.search("`[a-z_]+", message, flags=re.IGNORECASE), code
        assert re.search("received", message, flags=re.IGNORECASE), code


@pytest.mark.parametrize(
    "code",
    [
        "mlstm(q, k, v, i, f, initial_state=(C, n, m), mask=mask, reset=mask)",
        "slstm(gates, R, bias, initial_state=(h, h, h, h), mask=mask, reset=mask)",
        "mlstm_layer(x, initial_state=mlstm_layer.get_initial_state(B), mask=mask)",
        "slstm_layer(x, initial_state=slstm_layer.get_initial_state(B), mask=mask)",
        "stack(x, initial_state=stack.get_initial_state(B), mask=mask, reset=mask)",
        "large(x, initial_state=large.get_initial_state(B), mask=mask)",
        "lm.call_with_cache(ids, cache, padding_mask=mask)",
        "bare.score(ids, padding_mask=mask, scoring_mode='loss', target_ids=ids)",
    ],
)
def test_the_right_arguments_run(code):
    ran, known = [], dict(names())
    with kernels.observe(lambda op, args: ran.append(op)):
        eval(code, known)
    assert {"mlstm", "slstm"} & set(ran)
