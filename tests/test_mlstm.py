import conformance
import keras
import numpy as np
import oracle
import pytest
from conformance import BOTH, Case, Truth, mlstm_inputs, truth

from keras_xlstm.ops import mlstm, mlstm_step

pytestmark = pytest.mark.compiled
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="only TensorFlow traces with unknown sizes"
)


def reference(q, k, v, i, f, *state):
    h, state = oracle.mlstm(q, k, v, i, f, initial_state=state or None)
    return [h, *state]


@conformance.served("mlstm")
def test_values_states_and_gradients(kernel, case):
    conformance.check_all("mlstm", kernel, case)


@pytest.mark.parametrize("kernel", conformance.serving("mlstm", BOTH))
def test_calls_continue_each_other(kernel):
    conformance.check_calls_continue("mlstm", kernel)


@pytest.mark.parametrize("kernel", conformance.serving("mlstm", BOTH))
def test_small_decays_survive_large_ones(kernel):
    """Of one chunk: sums of log(f) go to -1800, and those of the last steps are far less than 1."""
    case = Case(S=64, i=0.0, f=4.0)
    inputs, state = mlstm_inputs(case)
    inputs["f"][:, :60] -= 34
    expected = Truth(reference, inputs, state, "float32")
    *tensors, C, n, m = expected.tensors.values()
    options = {"chunk_size": 64, "return_state": True, "kernel": kernel}
    h, state = mlstm(*tensors, initial_state=(C, n, m), **options)
    expected.check_outputs([h, *state])


@pytest.mark.parametrize("kernel", conformance.serving("mlstm", BOTH))
def test_small_gradients_survive_large_ones(kernel):
    """Of a forget gate behind which little was written, before a step that writes much."""
    inputs, _ = mlstm_inputs(Case(S=5, i=-14.0, f=4.0))
    inputs["i"][:, -1] += 16
    expected = Truth(reference, inputs, {}, "float32")
    run = conformance.form("mlstm", kernel, (("chunk_size", 5),), False)
    outputs, slopes = run(list(expected.tensors.values()), expected.weights, {})
    expected.check_outputs(outputs)
    expected.check_gradients(slopes)


@on_tensorflow
@pytest.mark.parametrize("kernel", ["auto", "chunkwise", "recurrent"])
def test_unknown_sizes(kernel):
    conformance.check_unknown_sizes("mlstm", kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_steps_continue_each_other(dtype):
    case = Case(S=8, mask="holes", reset="some", dtype=dtype)
    expected, flags = truth("mlstm", case), case.flags()
    *inputs, C, n, m = expected.tensors.values()
    outputs, state = [], (C, n, m)
    for t in range(case.S):
        now = {name: flag[:, t] for name, flag in flags.items()}
        h, state = mlstm_step(*(x[:, t] for x in inputs), state, **now)
        outputs.append(h)
    expected.check_outputs([keras.ops.stack(outputs, axis=1), *state])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gates_stay_float32_beside_low_precision(dtype):
    inputs, state = mlstm_inputs(BOTH)
    gates = {name: inputs.pop(name) for name in "if"}

    def reference(q, k, v, i, f, *state):
        h, state = oracle.mlstm(q, k, v, i, f, initial_state=state, **BOTH.flags())
        return [h, *state]

    expected = Truth(reference, inputs, gates | state, dtype)
    *tensors, C, n, m = expected.tensors.values()
    h, state = mlstm(*tensors, initial_state=(C, n, m), return_state=True, **BOTH.flags())
    expected.check_outputs([h, *state])


def test_oracle_derivatives():
    case = Case(S=9, mask="holes", reset="some")
    inputs, state = mlstm_inputs(case)

    def reference(q, k, v, i, f, *state):
        h, state = oracle.mlstm(q, k, v, i, f, initial_state=state, **case.flags())
        return [h, *state]

    conformance.check_oracle(reference, [*inputs.values(), *state.values()])


def test_oracle_without_a_stabilizer():
    """With eps = 0 the stabilizer cancels out: C = sum of decays, writes and k v^T."""
    inputs, _ = mlstm_inputs(Case(S=9))
    q, k, v, i, f = inputs.values()
    h, _ = oracle.mlstm(q, k, v, i, f, eps=0)
    forget, C, n = 1 / (1 + np.exp(-f)), 0, 0
    for t in range(9):
        write = np.exp(i[:, t, :, None]) * k[:, t]
        C = forget[:, t, :, None, None] * C + write[..., :, None] * v[:, t, :, None, :]
        n = forget[:, t, :, None] * n + write
        scaled_q = q[:, t] / np.sqrt(q.shape[-1])
        nq = np.abs(np.sum(n * scaled_q, axis=-1))
        plain = np.einsum("bhkv,bhk->bhv", C, scaled_q) / np.maximum(nq, 1)[..., None]
        np.testing.assert_allclose(h[:, t], plain, rtol=1e-12, atol=1e-12)
