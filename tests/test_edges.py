"""The numeric edge: gates, inputs, masks and sizes at which formulas break.

Outputs, states and gradients must be those of the oracle, and so finite. `pytest -s` prints a row
for each edge: the largest error beside the error that is allowed, see `conformance.py`.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import conformance
import keras
import numpy as np
import pytest
from conformance import OPS, Case, Truth, as_numpy, call
from keras import ops
from layer_cases import LAYERS, UNITS, D, assert_close, gradients, new_layer, noisy, numpy, random

from keras_xlstm.layers import XLSTMBlockStack
from keras_xlstm.ops.mlstm import GATE_LIMIT

BFLOAT16 = 2.0**127 * (2 - 2.0**-7)  # its largest
CASE = Case(S=12, chunk_size=5, mask="full", reset="never", eps=1e-6)


@dataclass(frozen=True)
class Edge:
    """A case with gates that are set to one number or, where there are more, drawn from them."""

    i: tuple = ()
    f: tuple = ()
    scale: float = 1.0  # of everything but gates
    case: Case = CASE

    @property
    def ties(self):
        """Whether gates are at the limit, and so at one number: then maxima have no derivative."""
        return any(abs(x) >= GATE_LIMIT for x in self.i + self.f)

    def inputs(self, op):
        inputs, state = OPS[op].inputs(self.case)
        rng = np.random.default_rng(7)
        gates = (
            [inputs["i"], inputs["f"]]
            if op == "mlstm"
            else [inputs["gates"][:, :, gate] for gate in range(2)]
        )
        for gate, numbers in zip(gates, (self.i, self.f), strict=True):
            if numbers:
                noise = 0 if self.ties else gate - gate.mean()
                gate[...] = rng.choice(numbers, size=gate.shape) + noise
        for name in ("q", "k", "v", "gates"):
            if name in inputs:
                inputs[name] *= self.scale
        return inputs, state


BOTH = replace(CASE, mask="holes", reset="some")
MIXED = {
    "±1e4": (-1e4, 0, 1e4),
    "±65504, float16's": (-GATE_LIMIT, 0, GATE_LIMIT),
    "±3e38, bfloat16's": (-BFLOAT16, 0, BFLOAT16),
    "±inf": (-np.inf, 0, np.inf),
}
GRID = {f"i = {i:g}, f = {f:g}": Edge((i,), (f,)) for i in (-1e4, 2, 1e4) for f in (-1e4, 2, 1e4)}
EDGES = GRID | {f"gates {name}": Edge(x, x) for name, x in MIXED.items()}
EDGES |= {f"gates {name}, holes, resets": Edge(x, x, case=BOTH) for name, x in MIXED.items()}
EDGES |= {f"inputs times {x:g}": Edge(scale=x) for x in (1e4, 1e-30, 1e-42, 0)}
EDGES |= {
    "all masked": Edge(case=replace(CASE, mask="empty")),
    "all masked, gates ±inf": Edge(*[MIXED["±inf"]] * 2, case=replace(BOTH, mask="empty")),
    "S = 0": Edge(case=replace(CASE, S=0)),
    "B = 0": Edge(case=replace(CASE, B=0)),
}
LOW = {"float16": MIXED["±65504, float16's"], "bfloat16": MIXED["±3e38, bfloat16's"]}
EDGES |= {
    f"{dtype}, its largest gates": Edge(x, x, case=replace(BOTH, dtype=dtype))
    for dtype, x in LOW.items()
}


def truth(op, edge):
    """What the oracle says, of gates within the limit that the operations document."""

    def reference(*arrays):
        pairs = zip(names, arrays, strict=True)
        arrays = [limited(x) if name in ("gates", "i", "f") else x for name, x in pairs]
        h, state = call(op, OPS[op].oracle, arrays, edge.case.flags())
        return [h, *state]

    inputs, state = edge.inputs(op)
    names, dtype = [*inputs, *state], edge.case.dtype
    expected = Truth(reference, inputs, state, dtype)
    if dtype != "float32":  # gates of 65504 cost float32 something too
        rounded = dict(zip(names, map(as_numpy, expected.tensors.values()), strict=True))
        in_float32 = Truth(reference, rounded, {}, "float32")
        pairs = zip(expected.outputs, in_float32.outputs, strict=True)
        expected.outputs = [(y, allowed + more) for (y, allowed), (_, more) in pairs]
    return expected


def limited(x):
    return np.where(np.abs(np.real(x)) > GATE_LIMIT, np.sign(np.real(x)) * GATE_LIMIT, x)


def report(*columns):
    """A row of the table, for `pytest -s`."""
    print("", keras.backend.backend(), *columns, "", sep=" | ", flush=True)


def everywhere():
    for op, edge in itertools.product(OPS, EDGES):
        for number, kernel in enumerate(conformance.serving(op, CASE)):
            slow = number > 0 and edge in GRID
            name = f"{op}-{kernel}-{edge}"
            yield pytest.param(op, kernel, edge, id=name, marks=[pytest.mark.long] * slow)


@pytest.mark.parametrize("op, kernel, edge", everywhere())
def test_values_and_gradients(op, kernel, edge):
    case, expected = EDGES[edge].case, truth(op, EDGES[edge])
    options = (("chunk_size", case.chunk_size),) if op == "mlstm" else ()
    run = conformance.form(op, kernel, options, jit=False)
    outputs, slopes = run(list(expected.tensors.values()), expected.weights, case.flags())
    expected.check_outputs(outputs)
    assert all(np.isfinite(numpy(x)).all() for x in slopes)
    if not EDGES[edge].ties:
        expected.check_gradients(slopes)
    rows = zip(outputs, expected.outputs, strict=True)
    errors = [(np.max(np.abs(as_numpy(y) - exact), initial=0), most) for y, (exact, most) in rows]
    error, allowed = max(errors, key=lambda pair: pair[0] / pair[1])
    report(op, kernel, edge, f"{error:.1e}", f"{allowed:.1e}", "finite")


# 100,000 steps. All at once they are too many for the parallel form.

STEPS, LAST = 100_000, 2_000
LONG_CASE = Case(S=STEPS, B=1, NH=2, DHQK=4, DHHV=3, state=False)


def hundred_thousand_steps(*in_the_gate):
    """Parametrizes a test; what is not named for the gate takes long."""
    for op in OPS:
        kernels = [x for x in conformance.serving(op, CASE) if x != "parallel"]
        for kernel, dtype in itertools.product(kernels, ["float32", "bfloat16"]):
            named = (op, dtype) in in_the_gate and kernel == kernels[0]
            yield pytest.param(op, kernel, dtype, marks=[] if named else pytest.mark.long)


def run_long(op, kernel, inputs, dtype):
    """Outputs, and gradients of the last output's sum, of (1, STEPS, ...) and float64 inputs."""
    tensors = [conformance.as_tensor(x, dtype) for x in inputs.values()]
    tensors += [ops.zeros(shape) for shape in STATES[op]]
    h_weight = np.zeros((1, STEPS, 2, 3), "float32")
    h_weight[:, -1] = 1
    weights = [h_weight, *(np.zeros(shape, "float32") for shape in STATES[op])]
    run = conformance.form(op, kernel, (), keras.backend.backend() == "tensorflow")
    outputs, slopes = run(tensors, weights, {"mask": None, "reset": None})
    assert all(np.isfinite(numpy(x)).all() for x in slopes)
    rounded = [as_numpy(x) for x in tensors[: OPS[op].num_inputs]]
    return [as_numpy(y) for y in outputs], [as_numpy(x) for x in slopes], rounded


STATES = {"mlstm": [(1, 2, 4, 3), (1, 2, 4), (1, 2)], "slstm": [(1, 2, 3)] * 4}


def remember_all(op, inputs, dtype):
    """h of the closed form that is left where forget gates are open, summed up in `dtype`.

    With nothing forgotten a stabilizer is the largest input gate so far.
    """

    def sums(x):
        return np.cumsum(x, axis=1, dtype=dtype)

    if op == "slstm":
        i, _, z, o = inputs[0].swapaxes(0, 2)[:, :, 0].astype(dtype)[:, None]
        return sums(np.exp(i) * np.tanh(z)) / sums(np.exp(i)) / (1 + np.exp(-o))
    q, k, v, i, _ = (x.astype(dtype) for x in inputs)
    written = np.exp(i)[..., None] * k
    C, n = sums(written[..., None] * v[..., None, :]), sums(written)
    q = q / np.sqrt(q.shape[-1]).astype(dtype)
    eps = 1e-6 * np.exp(np.maximum(np.maximum.accumulate(i, axis=1), 0))
    return (
        np.einsum("bshk,bshkv->bshv", q, C)
        / (np.maximum(np.abs(np.sum(n * q, -1)), 1) + eps)[..., None]
    )


@pytest.mark.parametrize("op, kernel, dtype", hundred_thousand_steps(("mlstm", "float32")))
def test_open_forget_gates(op, kernel, dtype):
    """What is remembered of the first step is so after 100,000, and errors do not pile up."""
    inputs, _ = OPS[op].inputs(replace(LONG_CASE, i=0, f=100))
    if op == "slstm":
        inputs["recurrent_kernel"][:] = inputs["bias"][:] = 0
    (h, *_), slopes, rounded = run_long(op, kernel, inputs, dtype)
    exact, in_float32 = (remember_all(op, rounded, x) for x in ("float64", "float32"))
    scale = np.max(np.abs(exact))
    allowed = 16 * np.max(np.abs(in_float32 - exact)) + conformance.ROUNDING[dtype] * scale
    decades = (0, 100), (100, 1_000), (1_000, 10_000), (10_000, STEPS)
    errors = [np.max(np.abs(h - exact)[:, start:stop]) for start, stop in decades]
    assert max(errors) <= allowed
    drift = "steps to 1e2, 1e3, 1e4, 1e5: " + ", ".join(f"{x:.1e}" for x in errors)
    report(op, kernel, f"{dtype}, 1e5 steps, f open", drift, f"{allowed:.1e}", "finite")
    # The first step's part of the last output.
    if op == "slstm":
        i, _, z, o = rounded[0][0, :, :, :, :].swapaxes(0, 1)
        share = np.exp(i[0]) / np.sum(np.exp(i), 0)
        slope, got = share * (1 - np.tanh(z[0]) ** 2) / (1 + np.exp(-o[-1])), slopes[0][0, 0, 2]
    else:
        q, k, _, i, _ = rounded
        n = np.sum(np.exp(i)[..., None] * k, 1)
        qk, nq = np.sum(q[0, -1] * k[0, 0], -1) / 2, np.abs(np.sum(n[0] * q[0, -1], -1)) / 2
        slope = np.exp(i[0, 0]) * qk / (np.maximum(nq, 1) + 1e-6 * np.exp(np.max(i, (0, 1))))
        slope, got = slope[:, None] + np.zeros(3), slopes[2][0, 0]
    rounding = max(1e-4, conformance.ROUNDING[dtype])  # 1e5 terms, each with its rounding error
    np.testing.assert_allclose(got, slope, rtol=rounding)


@pytest.mark.parametrize("op, kernel, dtype", hundred_thousand_steps())
def test_closing_forget_gates(op, kernel, dtype):
    """What is forgotten leaves no error behind: the last steps are as if they were all."""
    inputs, _ = OPS[op].inputs(replace(LONG_CASE, i=0, f=3))
    if op == "slstm":
        inputs["recurrent_kernel"] /= 4
        inputs["bias"][1] = 0  # else some gates would hardly close
    outputs, _, rounded = run_long(op, kernel, inputs, dtype)
    last = [x[:, -LAST:] if x.shape[:2] == (1, STEPS) else x for x in rounded]
    answers = [OPS[op].oracle(*(x.astype(y) for x in last)) for y in ("float64", "float32")]
    (h, state), (h32, state32) = answers
    outputs[0], half = outputs[0][:, -LAST // 2 :], slice(LAST // 2, None)
    wanted, in_float32 = (h[:, half], *state), (h32[:, half], *state32)
    for number, (y, exact, noisy_y) in enumerate(zip(outputs, wanted, in_float32, strict=True)):
        rounding = conformance.ROUNDING[dtype if number == 0 else "float32"]
        allowed = 16 * np.max(np.abs(exact - noisy_y)) + rounding * np.max(np.abs(exact))
        error = np.max(np.abs(y - exact))
        assert error <= allowed, f"output {number}"
        if number == 0:
            columns = f"{dtype}, 1e5 steps, f = 3", f"{error:.1e}", f"{allowed:.1e}", "finite"
            report(op, kernel, *columns)


# Layers: nothing to do, and nothing allowed.


@functools.cache
def layer_of(kind):
    if kind in LAYERS:
        return new_layer(kind, return_sequences=True, return_state=True), D
    layer = XLSTMBlockStack(2, num_heads=2, slstm_at=[1], block_style=kind, chunk_size=3)
    layer.build((None, None, 8))
    return noisy(layer, 0.3), 8


each_kind = pytest.mark.parametrize("kind", [*LAYERS, "large", "original"])


def apply(kind, x, state=None, **kwargs):
    """y, and the state as a flat list."""
    layer, _ = layer_of(kind)
    if kind in LAYERS:
        y, *state = layer(x, initial_state=state, **kwargs)
    else:
        y, state = layer(x, initial_state=state, return_state=True, **kwargs)
    return y, state


@each_kind
@pytest.mark.parametrize("B, S, masked", [(2, 0, False), (0, 3, True)])
def test_layers_without_rows_or_steps(kind, B, S, masked):
    mask = np.zeros((B, S), bool) if masked else None
    _, width = layer_of(kind)
    _, state = apply(kind, random(B, 2, width))
    y, after = apply(kind, random(B, S, width), state=state, mask=mask)
    assert tuple(y.shape) == (B, S, UNITS if kind in LAYERS else width)
    assert_close(after, state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("B, S", [(2, 0), (0, 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_output_without_rows_or_steps_is_0(kind, B, S, masked):
    mask = np.zeros((B, S), bool) if masked else None
    assert_close(new_layer(kind)(random(B, S, D), mask=mask), np.zeros((B, UNITS)))


@pytest.mark.parametrize(
    "kind", [*LAYERS, "large", pytest.param("original", marks=pytest.mark.long)]
)
def test_layers_of_which_no_step_happens(kind):
    _, width = layer_of(kind)
    _, state = apply(kind, random(2, 2, width))
    mask = np.zeros((2, 3), bool)

    def loss(x):
        y, after = apply(kind, x, state=state, mask=mask, reset=~mask)
        return ops.sum(y), [y, *keras.tree.flatten(after)]

    (y, *after), (slope,) = gradients(loss, [random(2, 3, width)])
    assert np.isfinite(numpy(y)).all() and np.isfinite(numpy(slope)).all()
    assert_close(after, keras.tree.flatten(state), rtol=0, atol=0)
