from importlib.metadata import entry_points

import keras
import pytest

if not entry_points(group="keras_xlstm.kernels"):
    raise pytest.UsageError(
        "keras_xlstm must be installed: without entry points no backend's kernels are found, and "
        'the tests would see the plain forms only. Run: pip install -e ".[test]"'
    )


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)
