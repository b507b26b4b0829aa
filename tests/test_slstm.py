import conformance
import keras
import numpy as np
import oracle
import pytest
from conformance import BOTH, Case, as_numpy, slstm_inputs, truth

from keras_xlstm.ops import slstm, slstm_step

pytestmark = pytest.mark.compiled
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow traces with unknown sizes"
)
each_kernel = pytest.mark.parametrize("kernel", conformance.serving("slstm", BOTH))


@conformance.served("slstm")
def test_values_states_and_gradients(kernel, case):
    conformance.check_all("slstm", kernel, case)


@each_kernel
def test_calls_continue_each_other(kernel):
    conformance.check_calls_continue("slstm", kernel)


@on_tensorflow
@pytest.mark.parametrize("kernel", ["auto", "scan"])
def test_unknown_sizes(kernel):
    conformance.check_unknown_sizes("slstm", kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_continue_each_other(dtype):
    case = Case(S=8, mask="holes", reset="some", dtype=dtype)
    expected, flags = truth("slstm", case), case.flags()
    gates, recurrent_kernel, bias, *state = expected.tensors.values()
    outputs = []
    for t in range(case.S):
        now = {name: flag[:, t] for name, flag in flags.items()}
        h, state = slstm_step(gates[:, t], recurrent_kernel, bias, state, **now)
        outputs.append(h)
    expected.check_outputs([keras.ops.stack(outputs, axis=1), *state])


@each_kernel
def test_fresh_and_running_elements_side_by_side(kernel):
    """Whether n is 0 is asked of every element, not of the batch."""
    inputs, state = slstm_inputs(Case(S=3))
    fresh = np.random.default_rng(0).random(state["n"].shape) < 0.5
    state = {name: np.where(fresh, 0, x) for name, x in state.items()}
    # An input gate far below m = 0: a fresh element must take it all the same.
    inputs["gates"][:, 0, 0] = -60

    def reference(gates, recurrent_kernel, bias, *state):
        h, state = oracle.slstm(gates, recurrent_kernel, bias, initial_state=state)
        return [h, *state]

    expected = conformance.Truth(reference, inputs, state, "float32")
    *tensors, h, c, n, m = expected.tensors.values()
    h, state = slstm(*tensors, initial_state=(h, c, n, m), return_state=True, kernel=kernel)
    expected.check_outputs([h, *state])


@each_kernel
def test_recurrent_scale_scales_the_rows_of_the_recurrent_kernel(kernel):
    expected = truth("slstm", BOTH)
    gates, R, bias, *state = expected.tensors.values()
    scale = np.random.default_rng(0).normal(size=state[0].shape).astype("float32")
    options = {"return_state": True, "kernel": kernel}
    h, _ = slstm(gates, R, bias, initial_state=state, recurrent_scale=scale, **options)
    for b, row in enumerate(scale):
        one_state = [as_numpy(x)[b : b + 1] for x in state]
        one, _ = oracle.slstm(
            as_numpy(gates)[b : b + 1],
            as_numpy(R) * row[:, :, None, None],
            as_numpy(bias),
            initial_state=one_state,
        )
        # A float32 matrix product in another order of factors, 65 times in a row.
        np.testing.assert_allclose(as_numpy(h)[b : b + 1], one, rtol=1e-4, atol=1e-5)


def test_oracle_derivatives():
    case = Case(S=9, mask="holes", reset="some")
    inputs, state = slstm_inputs(case)

    def reference(gates, recurrent_kernel, bias, *state):
        flags = case.flags()
        h, state = oracle.slstm(gates, recurrent_kernel, bias, initial_state=state, **flags)
        return [h, *state]

    conformance.check_oracle(reference, [*inputs.values(), *state.values()])


def test_oracle_without_a_stabilizer():
    """c and n share the stabilizer, so that h = o c / n does not depend on it."""
    inputs, _ = slstm_inputs(Case(S=9))
    gates, recurrent_kernel, bias = inputs.values()
    outputs, _ = oracle.slstm(gates, recurrent_kernel, bias)
    h = c = n = np.zeros_like(outputs[:, 0])
    for t in range(9):
        raw = gates[:, t] + np.einsum("bhd,hdge->bghe", h, recurrent_kernel) + bias
        i, f, z, o = raw.swapaxes(0, 1)
        c = c / (1 + np.exp(-f)) + np.exp(i) * np.tanh(z)
        n = n / (1 + np.exp(-f)) + np.exp(i)
        h = c / n / (1 + np.exp(-o))
        np.testing.assert_allclose(outputs[:, t], h, rtol=1e-12, atol=1e-12)
