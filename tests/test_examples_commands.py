"""Wrong command lines of the examples: what each is told, at once, and no file is left."""

import os
import runpy
import sys
from pathlib import Path

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("once is enough", allow_module_level=True)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMANDS = {
    "convert_checkpoint.py a b": "the following arguments are required: --to",
    "convert_checkpoint.py a b --to pickle": "argument --to: invalid choice: 'pickle'",
    "convert_checkpoint.py a . --to keras": "The target must not exist, so that nothing is over",
    "convert_checkpoint.py a b --to keras": "Unknown preset identifier",
    "convert_checkpoint.py xlstm_tiny b --to keras --dtype int9": "Cannot convert 'int9' to a",
    "memory_table.py small": "No row is called ['small']. There are: ['large',",
    "scale_plan.py v9:2x2": "topology must be of one of ['v5e', 'v5p', 'v6e'], such as v5p:2x2x1",
    "scale_plan.py v5e:2x2 rows=4": "argument mesh: must be like batch=2,model=2, not 'rows=4'",
    "scale_plan.py v5e:2x2 batch": "argument mesh: must be a positive integer, not ''",
    "scale_plan.py v5e:2x2 batch=3": "must multiply to the chips of v5e:2x2, 4. Received",
    "scale_plan.py v5e:2x2 batch=4 8": "argument tokens: must be BATCHxLENGTH, not '8'",
    "scale_plan.py v5e:2x2 batch=4 8x0": "argument tokens: must be a positive integer, not '0'",
    "scale_plan.py v5e:2x2 batch=4 --decode 0": "argument --decode: must be a positive integer",
    "scale_plan.py v5e:2x2 batch=4 --depths 2": "argument --depths: expected 2 arguments",
    "scale_plan.py v5e:2x2 batch=4 --num_heads x": "argument --num_heads: must be a positive",
    "train_distributed.py --processes 3": "argument --processes: invalid choice: 3",
    "train_distributed.py --epochs 1": "argument --epochs: must be 2 or more, not 1",
    "train_distributed.py --worker 0": "argument --worker: needs --address and --folder",
    "benchmarks/cpu.py mlstm gru": "must be one of ['mlstm', 'sweep',",
    "benchmarks/cpu.py --threads 0": "argument --threads: must be a positive integer, not '0'",
    "benchmarks/kernels.py": "the following arguments are required: --compile",
    "benchmarks/kernels.py --compile sm_1": "argument --compile: invalid choice: 'sm_1'",
    "benchmarks/kernels.py --compile sm_90 --widths 64x": "must be like 128x256 or 64, not '64x'",
    "benchmarks/kernels.py --compile sm_90 --walks dz": "argument --walks: invalid choice: 'dz'",
    "benchmarks/kernels.py --device tpu": "argument --device: invalid choice: 'tpu'",
    "benchmarks/kernels.py --device cpu decoding": "must be one of ['headline', 'lengths',",
    "benchmarks/kernels.py --device cpu --dtypes int8": "argument --dtypes: invalid choice",
    "benchmarks/kernels.py --device cpu --turns 0": "argument --turns: must be a positive integer",
    "benchmarks/pallas.py --compile v4": "argument --compile: invalid choice: 'v4'",
    "benchmarks/pallas.py --compile v5e --widths 1x2x3": "must be like 128x256 or 64, not '1x2x3'",
    "benchmarks/pallas.py --compile v5e --steps 0": "argument --steps: must be a positive integer",
    "benchmarks/quantization.py int2": "No mode is called ['int2']. There are: ['int8',",
}


@pytest.fixture
def environment():
    """Scripts set variables, and find their neighbours, as processes of their own."""
    variables, path, modules = dict(os.environ), list(sys.path), set(sys.modules)
    yield
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:] = path
    for name in set(sys.modules) - modules:  # such as `kernels`
        if EXAMPLES in Path(getattr(sys.modules[name], "__file__", None) or "").parents:
            del sys.modules[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_wrong_command_is_told(environment, tmp_path, monkeypatch, capsys, command):
    script, *arguments = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    sys.path.insert(0, str((EXAMPLES / script).parent))
    with pytest.raises((SystemExit, ValueError)) as caught:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    told = capsys.readouterr().err + str(caught.value)
    assert COMMANDS[command] in told
    assert not list(tmp_path.iterdir())
