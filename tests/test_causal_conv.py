from dataclasses import replace

import conformance
import keras
import numpy as np
import oracle
import pytest
from conformance import Case, Truth

from keras_xlstm.ops import causal_conv1d

pytestmark = pytest.mark.compiled
D = 5
SHORT = Case(S=11, mask="full", reset="never", jit=True)  # one compilation serves them all
CASES = {
    "plain": SHORT,
    "mask-left": replace(SHORT, mask="left"),
    "mask-right": replace(SHORT, mask="right"),
    "mask-holes": replace(SHORT, mask="holes"),
    "mask-first": replace(SHORT, mask="first"),
    "mask-all": replace(SHORT, mask="empty", reset="some"),
    "reset-first": replace(SHORT, reset="first"),
    "reset-some": replace(SHORT, reset="some"),
    "mask-and-reset": replace(SHORT, mask="holes", reset="some"),
    "bfloat16": Case(S=11, mask="holes", reset="some", dtype="bfloat16"),
    "float16": Case(S=11, mask="holes", reset="some", dtype="float16"),
    "no-step": Case(S=0, mask="full", reset="never"),
    "one-step": Case(S=1),
    "shorter-than-the-window": Case(S=2, mask="right", B=3),
    "fresh": Case(S=65, state=False),
    "fresh-mask": Case(S=12, state=False, mask="left"),
    "fresh-reset": Case(S=12, state=False, reset="some"),
}


def problem(case, K=4):
    rng = np.random.default_rng(0)
    shapes = {"x": (case.B, case.S, D), "kernel": (K, D), "bias": (D,)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    state = {"state": rng.normal(size=(case.B, K - 1, D))} if case.state else {}

    def reference(x, kernel, bias, *state):
        return list(oracle.causal_conv1d(x, kernel, bias, **given(state), **case.flags()))

    return reference, inputs, state


def given(state):
    return {"initial_state": state[0]} if state else {}


def conv(tensors, flags):
    x, kernel, bias, *state = tensors
    return list(causal_conv1d(x, kernel, bias, return_state=True, **given(state), **flags))


plain_conv = conformance.outputs_and_gradients(conv, jit=False)
compiled_conv = conformance.outputs_and_gradients(conv, jit=True)


def check(case, K=4):
    expected = Truth(*problem(case, K), case.dtype)
    run = compiled_conv if case.jit else plain_conv
    outputs, gradients = run(list(expected.tensors.values()), expected.weights, case.flags())
    expected.check_outputs(outputs)
    expected.check_gradients(gradients)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_states_and_gradients(case):
    check(case)


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("flags", [{}, {"mask": "holes", "reset": "some"}], ids=["plain", "flags"])
def test_narrow_windows(K, flags):
    check(Case(S=11, **flags), K)


def test_calls_continue_each_other():
    case = CASES["mask-and-reset"]
    expected = Truth(*problem(case), case.dtype)
    x, kernel, bias, state = expected.tensors.values()
    outputs = []
    for piece in slice(0, 2), slice(2, 2), slice(2, 3), slice(3, case.S):
        flags = {name: flag[:, piece] for name, flag in case.flags().items()}
        y, state = conv([x[:, piece], kernel, bias, state], flags)
        outputs.append(y)
    expected.check_outputs([keras.ops.concatenate(outputs, axis=1), state])


def test_without_bias_and_state():
    expected = Truth(*problem(Case(S=11, state=False)), "float32")
    x, kernel, bias = expected.tensors.values()
    y = causal_conv1d(x, kernel) + bias
    exact, allowed = expected.outputs[0]
    conformance.check("y", conformance.as_numpy(y), exact, allowed)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow traces with unknown sizes"
)
def test_unknown_sizes():
    import tensorflow as tf

    case = CASES["mask-and-reset"]
    expected = Truth(*problem(case), case.dtype)
    x, kernel, bias, state = expected.tensors.values()
    any_flag = tf.TensorSpec([None, None], "bool")
    run = tf.function(
        lambda x, state, flags: conv([x, kernel, bias, state], flags),
        input_signature=(
            tf.TensorSpec([None, None, D]),
            tf.TensorSpec([None, 3, D]),
            {"mask": any_flag, "reset": any_flag},
        ),
    )
    expected.check_outputs(run(x, state, case.flags()))


def test_oracle_derivatives():
    reference, inputs, state = problem(CASES["mask-and-reset"])
    conformance.check_oracle(reference, [*inputs.values(), *state.values()])


def test_oracle_is_a_convolution():
    reference, inputs, _ = problem(Case(S=11, state=False))
    x, kernel, bias = inputs.values()
    y, _ = reference(x, kernel, bias)
    for b in range(len(x)):
        for d in range(D):
            plain = np.convolve(x[b, :, d], kernel[::-1, d])[:11] + bias[d]
            np.testing.assert_allclose(y[b, :, d], plain, rtol=1e-12, atol=1e-12)
