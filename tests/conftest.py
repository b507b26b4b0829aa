import gc
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

# Triton and TensorFlow bring an LLVM each, and a process that has loaded both may end in an error
# of it. torch loads Triton where it can, and KerasHub TensorFlow. So only those tests may load
# Triton that run its kernels, interpreted (see `__main__.py`) or on a GPU.
if "TRITON_INTERPRET" not in os.environ and "gpu" not in sys.argv:
    sys.modules["triton"] = None  # type: ignore[assignment]

# Devices for `test_distribution.py`.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import keras
import pytest
from hypothesis import HealthCheck, Phase, settings

if not entry_points(group="keras_xlstm.kernels"):
    raise pytest.UsageError(
        "keras_xlstm must be installed: without entry points no backend's kernels are found, and "
        'the tests would see the plain forms only. Run: pip install -e ".[test]"'
    )

# The same draws at each run, and few where shapes are compiled for. More, and others each time, by
# `pytest tests/test_properties.py --hypothesis-profile=long`.
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
COMMON = dict(deadline=None, suppress_health_check=CHECKS)
EXAMPLES = {"torch": 15, "jax": 8, "tensorflow": 4}.get(keras.backend.backend(), 4)
ONCE = dict(derandomize=True, phases=[Phase.explicit, Phase.generate])  # and shrinks nothing
settings.register_profile("gate", max_examples=EXAMPLES, **ONCE, **COMMON)
settings.register_profile("long", max_examples=100, print_blob=True, **COMMON)
settings.load_profile("gate")

TESTS = Path(__file__).parent.glob("test_*.py")
# `pytest -m gpu` loads Triton: files without such tests, which may load TensorFlow, stay out.
if "gpu" in sys.argv:
    collect_ignore = [path.name for path in TESTS if "mark.gpu" not in path.read_text()]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if keras.backend.backend() != "torch":
        for item in items:
            if item.get_closest_marker("long_on_xla"):
                item.add_marker("long")


def pytest_collection_finish():
    """Collections, which Keras asks for often, need not look at what is imported by now."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def interpreted(monkeypatch):
    """Sets what Pallas computes as, and names the kernel: what is compiled for a name is kept."""
    from keras_xlstm_pallas import mlstm, slstm
    from keras_xlstm_pallas.target import SETTING

    from keras_xlstm import kernels

    names = []

    def use(op, platform):
        monkeypatch.setenv(SETTING, f"interpret-{platform}")
        module, name = {"mlstm": mlstm, "slstm": slstm}[op], f"pallas as on a {platform}"
        kernels.register(name, getattr(module, op), module.why_not, op=op, priority=-100)
        names.append((op, name))
        return name

    yield use
    for op, name in names:
        kernels._kernels[op].pop(name)
