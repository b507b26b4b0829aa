import conformance
import keras
import numpy as np
import pytest
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.ops import mlstm


@conformance.served("mlstm")
def test_values_and_states(kernel, case):
    conformance.check_values_and_states("mlstm", kernel, case)


@conformance.served("mlstm")
def test_gradients(kernel, case):
    conformance.check_gradients("mlstm", kernel, case)
