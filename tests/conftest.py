from importlib import metadata

import keras
import pytest

if not metadata.entry_points(group="keras_xlstm.kernels"):
    pytest.exit(
        "keras-xlstm is not installed, so its kernels cannot be found and only the plain forms "
        'would be tested. Run: pip install -e ".[test]"',
        returncode=4,
    )


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)
