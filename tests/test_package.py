"""What a person meets first: the import, the public names, the README, the two command lines."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import keras
import pytest

import keras_xlstm

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PUBLIC = {
    "ops": """mlstm slstm mlstm_step slstm_step mlstm_recurrent mlstm_parallel mlstm_chunkwise
        causal_conv1d soft_cap""",
    "kernels": "register available explain use observe",
    "inspect": "trace Trace half_life effective_rank",
    "layers": """SLSTM MLSTM SLSTMCell MLSTMCell SLSTMBlock MLSTMBlock XLSTMLargeBlock
        XLSTMBlockStack CausalConv1D HeadwiseDense MultiHeadNorm""",
    "models": "XLSTMBackbone XLSTMCausalLM XLSTMCausalLMPreprocessor XLSTMTokenizer",
}


def run_python(code):
    """What `code` prints in a fresh interpreter, under the same backend."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_no_framework_and_no_keras_hub():
    """Beyond what Keras itself imports: the backend, and JAX for one of its callbacks."""
    code = """
import sys, keras
before = set(sys.modules)
import keras_xlstm
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    brought = set(run_python(code).split())
    assert "keras_xlstm" in brought
    assert not brought & {"jax", "tensorflow", "torch", "keras_hub", "transformers"}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_exist(module):
    public = getattr(keras_xlstm, module)
    missing = [name for name in PUBLIC[module].split() if not hasattr(public, name)]
    assert not missing
    # What the module declares is there too, so that `from ... import *` works.
    assert all(hasattr(public, name) for name in getattr(public, "__all__", ()))


def test_version_is_that_of_the_installed_package():
    assert keras_xlstm.__version__ == version("keras-xlstm")


def test_each_backend_finds_its_kernels():
    found = {e.name: e for e in entry_points(group="keras_xlstm.kernels")}
    assert {"jax", "tensorflow", "torch"} <= set(found)
    assert all(callable(e.load()) for e in found.values())
    fast = {"jax": "xla", "tensorflow": "xla", "torch": "torch"}[keras.backend.backend()]
    assert fast in keras_xlstm.kernels.available()


def test_readme_examples_run(tmp_path, monkeypatch):
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    names = {}
    for number, block in enumerate(blocks, start=1):
        if "import jax" in block and keras.backend.backend() != "jax":
            continue
        exec(compile(block, f"README.md, block {number}", "exec"), names)


def test_readme_has_the_command_line_that_ci_runs():
    *_, last = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    commands = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    assert last in "".join(commands).splitlines()


def test_command_lines_name_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r'pip install -e "\.\[([\w,]+)\]"', README)
    assert len(named) == 2
    assert {e for extra in named for e in extra.split(",")} <= set(extras["optional-dependencies"])


def test_no_file_names_a_place_on_one_machine():
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp)/\w")
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "README.md" in files
    texts = {
        name: (ROOT / name).read_text("utf-8", errors="replace")  # pictures are among them
        for name in files
        if (ROOT / name).is_file()
    }
    assert not [name for name, text in texts.items() if home.search(text)]
