"""One suite for every form and every registered kernel, on every backend.

`test_mlstm.py` and `test_slstm.py` run it for all of `kernels.available(op)`, those of other
packages included, on the cases that a kernel does not object to.

What is allowed: 16 times what float32 costs the equations themselves (how far the oracle in
float32 is from the oracle in float64, on the same inputs), and one rounding of the output. For
inputs in bfloat16 and float16: that, or twice what rounding them once costs (how far the oracle's
answer moves), and one rounding of the output. The same for derivatives, by complex step; in these
dtypes three times what rounding each of their numbers costs, which add up like steps of a random
walk.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import keras
import numpy as np
import oracle
import pytest
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.ops import mlstm, slstm

TIMES = {"float32": 16, "bfloat16": 2, "float16": 2}
ROUNDING = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TINY = 2.0**-126  # below, XLA takes 0
LEAST = {"float32": 0.0, "bfloat16": 0.0, "float16": 2.0**-25}  # up to there it rounds to 0
UNDERFLOW = 1e-16  # of derivatives: float32 loses 1e-38, where 1 / exp(-m) = exp(50) follows


@dataclass(frozen=True)
class Case:
    """One call. Flags that are "full" and "never" are given, and change nothing."""

    S: int
    chunk_size: int | None = None
    i: float | None = -3.0  # where pre-activations lie; None: at -50, 0 and 50, mixed
    f: float | None = 2.0
    mask: str | None = None
    reset: str | None = None
    state: bool = True
    dtype: str = "float32"
    jit: bool = False  # compiled as a user would, rather than what is fastest to test
    eps: float = 1e-6
    B: int = 2
    NH: int = 3
    DHQK: int = 5
    DHHV: int = 7
    seed: int = 0

    def flags(self):
        rng, steps = np.random.default_rng(1), np.tile(np.arange(self.S), (self.B, 1))
        lengths = self.S // 2 + np.arange(self.B)[:, None]  # each row has its own
        masks = {
            None: None,
            "full": steps >= 0,
            "empty": steps < 0,
            "first": steps > 0,
            "left": steps >= self.S - lengths,
            "right": steps < lengths,
            "holes": rng.random(steps.shape) < 0.6,
        }
        resets = {
            None: None,
            "never": steps < 0,
            "first": steps == 0,
            "some": rng.random(steps.shape) < 0.25,  # masked steps and neighbours among them
        }
        return {"mask": masks[self.mask], "reset": resets[self.reset]}


# One compilation serves all that are alike.
ALIKE = Case(S=65, chunk_size=16, mask="full", reset="never", jit=True)
BOTH = replace(ALIKE, mask="holes", reset="some")
CASES = {
    "plain": ALIKE,
    "mask-left": replace(ALIKE, mask="left"),
    "mask-right": replace(ALIKE, mask="right"),
    "mask-holes": replace(ALIKE, mask="holes"),
    "mask-first": replace(ALIKE, mask="first"),
    "mask-all": replace(ALIKE, mask="empty", reset="some"),
    "reset-first": replace(ALIKE, reset="first"),
    "reset-some": replace(ALIKE, reset="some"),
    "mask-and-reset": BOTH,
    "i-high": replace(ALIKE, i=50),
    "i-low": replace(ALIKE, i=-50),
    "f-high": replace(ALIKE, f=50),
    "f-low": replace(ALIKE, f=-50),
    "i-high-f-high": replace(ALIKE, i=50, f=50),
    "i-high-f-low": replace(ALIKE, i=50, f=-50),
    "i-low-f-high": replace(ALIKE, i=-50, f=50),
    "i-low-f-low": replace(ALIKE, i=-50, f=-50),
    "i-f-mixed": replace(ALIKE, i=None, f=None),
    "i-f-mixed-mask-and-reset": replace(BOTH, i=None, f=None),
    "bfloat16": replace(BOTH, dtype="bfloat16", jit=False),
    "float16": replace(BOTH, dtype="float16", jit=False),
    "no-step": Case(S=0),
    "one-step": Case(S=1, mask="full", reset="never", eps=0.1, jit=True),
    "one-step-i-f-mixed": Case(S=1, mask="full", reset="never", i=None, f=None, eps=0.1, jit=True),
    "one-step-masked": Case(S=1, mask="empty", reset="first", eps=0.1, jit=True),
    "one-step-reset": Case(S=1, mask="full", reset="first", eps=0.1, jit=True),
    "two-steps-narrow": Case(S=2, state=False, B=1, NH=1, DHQK=1, DHHV=1),
    "63-steps": Case(S=63, mask="right"),
    "64-steps": Case(S=64, state=False, DHQK=16, DHHV=32),
    "65-steps": Case(S=65, mask="left", reset="some"),
    "200-steps": Case(S=200, state=False, eps=0.1, B=1, NH=2, DHQK=24, DHHV=20),
}
MLSTM_CASES = CASES | {
    "chunks-of-1": replace(BOTH, chunk_size=1, jit=False),
    "chunk-of-100": replace(BOTH, chunk_size=100, jit=False),
}

# Without chunks, 25 steps show what 65 do.
SLSTM_CASES = {
    name: replace(case, S=25) if case.chunk_size else case for name, case in CASES.items()
}
# A state that is fresh before the first step and, in rows without steps, after the last.
SLSTM_CASES["mask-all-fresh"] = Case(S=2, mask="empty", state=False)


def gate(rng, shape, at):
    """Around `at`, never exactly there: where two maxima tie there is no derivative."""
    return rng.normal(size=shape) + (rng.choice([-50, 0, 50], size=shape) if at is None else at)


def mlstm_inputs(case):
    B, S, NH, DHQK, DHHV = case.B, case.S, case.NH, case.DHQK, case.DHHV
    rng = np.random.default_rng(case.seed)
    # Keys of one direction, queries of both: n^T q is divided by, and has either sign, not 0.
    q, k = 1 + 0.3 * rng.normal(size=(2, B, S, NH, DHQK))
    inputs = {
        "q": q * rng.choice([-1, 1], size=(B, S, NH, 1)),
        "k": k,
        "v": rng.normal(size=(B, S, NH, DHHV)),
        "i": gate(rng, (B, S, NH), case.i),
        "f": gate(rng, (B, S, NH), case.f),
    }
    state = {
        "C": rng.normal(size=(B, NH, DHQK, DHHV)),
        "n": 1 + 0.3 * rng.normal(size=(B, NH, DHQK)),
        "m": rng.normal(size=(B, NH)),
    }
    return inputs, state if case.state else {}


def slstm_inputs(case):
    B, S, NH, DH = case.B, case.S, case.NH, case.DHHV
    rng = np.random.default_rng(case.seed)
    gates = rng.normal(size=(B, S, 4, NH, DH))
    gates[:, :, 0] = gate(rng, (B, S, NH, DH), case.i)
    gates[:, :, 1] = gate(rng, (B, S, NH, DH), case.f)
    inputs = {
        "gates": gates,
        "recurrent_kernel": rng.normal(size=(NH, DH, 4, DH)) / DH**0.5,
        "bias": rng.normal(size=(4, NH, DH)),
    }
    h, c, n, m = rng.normal(size=(4, B, NH, DH))
    state = {"h": h, "c": c, "n": 0.5 + abs(n), "m": m}
    return inputs, state if case.state else {}


class Op(NamedTuple):
    cases: dict  # name -> case
    inputs: Callable  # case -> inputs, state; each name -> float64 array
    ours: Callable
    oracle: Callable
    options: tuple  # the fields of a case that are arguments of the op
    num_inputs: int
    num_sequences: int  # so many of the inputs, the first, have a time axis


OPS = {
    "mlstm": Op(MLSTM_CASES, mlstm_inputs, mlstm, oracle.mlstm, ("chunk_size", "eps"), 5, 5),
    "slstm": Op(SLSTM_CASES, slstm_inputs, slstm, oracle.slstm, (), 3, 1),
}


class Truth:
    """What a NumPy function answers, its derivatives, and how far from both one may be.

    Args:
        reference: callable, from arrays to a list of arrays.
        inputs: dict, name to float64 array, of what is given in `dtype`.
        state: dict, name to float64 array, of what is given in float32.
        dtype: string.
        lossy: int, how often the equations are also computed with random rounding, for inputs of
            which any may come: one run in float32 may be exact by luck. 8 times the most that is
            lost so is allowed.
    """

    def __init__(self, reference, inputs, state, dtype, lossy=0):
        rng, self.dtype = np.random.default_rng(2), dtype
        self.tensors = {name: as_tensor(x, dtype) for name, x in inputs.items()}
        self.tensors |= {name: as_tensor(x, "float32") for name, x in state.items()}
        exact = [as_numpy(x) for x in self.tensors.values()]
        self.lossy, self.exact, self.reference = lossy, exact, reference
        self.inexact = [(TIMES["float32"], [x.astype("float32") for x in exact])]
        if dtype != "float32":
            self.inexact.append((TIMES[dtype], [*inputs.values(), *state.values()]))
        self.outputs = self.around(reference)
        self.weights = [rng.normal(size=y.shape).astype("float32") for y, _ in self.outputs]
        # The gradient of outputs comes back in their dtype.
        self.weights[0] = as_numpy(as_tensor(self.weights[0], dtype)).astype("float32")
        self.directions = [rng.normal(size=(3, *x.shape)) for x in exact]

    def loss(self, *inputs):
        outputs = self.reference(*inputs)
        return sum(np.sum(w * y) for w, y in zip(self.weights, outputs, strict=True))

    @functools.cached_property
    def derivatives(self):
        def along(j, *inputs):
            still = [np.zeros(x.shape, x.dtype) for x in inputs]
            moves = [
                [*still[:j], d.astype(still[j].dtype), *still[j + 1 :]] for d in self.directions[j]
            ]
            return np.array([oracle.directional(self.loss, inputs, move) for move in moves])

        def of_each(*inputs):
            return [along(j, *inputs) for j in range(len(inputs))]

        return self.around(of_each)

    def around(self, function):
        """Of each answer: the answer, and the distance from it that is allowed."""

        def apart(some, others):
            pairs = zip(some, others, strict=True)
            return np.array([np.max(abs(x - y), initial=0) for x, y in pairs])

        exact = function(*self.exact)
        noise = np.max([x * apart(exact, function(*inputs)) for x, inputs in self.inexact], 0)
        if self.lossy:
            oracle.Lossy.random = np.random.default_rng(0)

            def run(kind):
                return function(*(x.view(kind) for x in self.exact))

            held = run(oracle.Held)
            for _ in range(self.lossy):
                for whole, kind in ((held, oracle.LossyHeld), (exact, oracle.Lossy)):
                    noise = np.maximum(noise, 8 * apart(whole, run(kind)))
        sizes = apart(exact, [0.0] * len(exact))
        return list(zip(exact, noise + ROUNDING[self.dtype] * sizes + TINY, strict=True))

    def check_outputs(self, outputs):
        for number, (y, (exact, allowed)) in enumerate(zip(outputs, self.outputs, strict=True)):
            dtype = "float32" if number else self.dtype
            assert tuple(y.shape) == exact.shape
            assert keras.backend.standardize_dtype(y.dtype) == dtype
            check(f"output {number}", as_numpy(y), exact, allowed + LEAST[dtype])

    def check_gradients(self, gradients):
        rows = zip(self.tensors, gradients, self.directions, self.derivatives, strict=True)
        for name, gradient, directions, (exact, allowed) in rows:
            dtype = keras.backend.standardize_dtype(gradient.dtype)
            terms = as_numpy(gradient) * directions
            got, allowed = np.array([np.sum(x) for x in terms]), allowed + UNDERFLOW
            if dtype != "float32":  # each number is rounded, apart from others
                rounded = ROUNDING[dtype] * abs(terms) + LEAST[dtype] * abs(directions)
                allowed += 3 * max(np.linalg.norm(x) for x in rounded)
            check(f"derivative for {name}", got, exact, allowed)


def check(what, got, exact, allowed):
    error = np.max(np.abs(got - exact), initial=0)
    assert error <= allowed, f"{what}: off by {error:.1e}, allowed {allowed:.1e}"  # NaN fails too


def as_tensor(x, dtype):
    return ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype)


def as_numpy(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")


def outputs_and_gradients(f, jit):
    """`g(tensors, weights, flags) -> outputs of f, gradients of sum(weights * outputs)`.

    `f` takes a list of tensors and a dict of flags.
    """

    def loss(tensors, weights, flags):
        outputs = f(tensors, flags)
        terms = (ops.sum(w * ops.cast(y, "float32")) for w, y in zip(weights, outputs, strict=True))
        return sum(terms), outputs

    if keras.backend.backend() == "jax":
        import jax

        options = {} if jit else {"xla_backend_optimization_level": 0}
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)

        def run(tensors, weights, flags):
            (_, outputs), gradients = compiled(tensors, weights, flags)
            return outputs, gradients

    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        def run(tensors, weights, flags):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                total, outputs = loss(tensors, weights, flags)
            return outputs, tape.gradient(total, tensors, unconnected_gradients="zero")

        if jit:
            run = tf.function(run, jit_compile=True, autograph=False)

    else:
        import torch

        def run(tensors, weights, flags):
            tensors = [x.detach().requires_grad_() for x in tensors]
            weights = [ops.convert_to_tensor(w) for w in weights]
            total, outputs = loss(tensors, weights, flags)
            return outputs, torch.autograd.grad(total, tensors, materialize_grads=True)

    return run


def call(op, function, tensors, flags, /, **options):
    count = OPS[op].num_inputs
    state = tensors[count:] or None
    return function(*tensors[:count], initial_state=state, **flags, **options)


@functools.cache
def truth(op, case):
    options = {"eps": case.eps} if "eps" in OPS[op].options else {}

    def reference(*arrays):
        h, state = call(op, OPS[op].oracle, arrays, case.flags(), **options)
        return [h, *state]

    return Truth(reference, *OPS[op].inputs(case), case.dtype)


@functools.cache
def form(op, kernel, options, jit):
    def run(tensors, flags):
        h, state = call(
            op, OPS[op].ours, tensors, flags, kernel=kernel, return_state=True, **dict(options)
        )
        return [h, *state]

    return outputs_and_gradients(run, jit)


@functools.cache
def answers(op, kernel, case):
    expected = truth(op, case)
    options = tuple((name, getattr(case, name)) for name in OPS[op].options)
    tensors = list(expected.tensors.values())
    run = form(op, kernel, options, case.jit)
    return run(tensors, expected.weights, case.flags())


def serving(op, case):
    """The kernels that can serve a case, best first. Where there is no step, none is asked."""
    if case.S == 0:
        return kernels.available(op)
    inputs, state = OPS[op].inputs(case)
    tensors = [as_tensor(x, case.dtype) for x in inputs.values()]
    tensors += [as_tensor(x, "float32") for x in state.values()]
    verdicts = {
        kernel: call(op, kernels.explain, tensors, case.flags(), op=op, kernel=kernel)
        for kernel in kernels.available(op)
    }
    return [kernel for kernel, verdict in verdicts.items() if f"* {kernel}:" in verdict]


def served(op):
    """Parametrizes a test over the kernels of `op`, each with the cases that it does not refuse."""
    pairs = [
        pytest.param(kernel, case, id=f"{kernel}-{name}")
        for name, case in OPS[op].cases.items()
        for kernel in serving(op, case)
    ]
    pairs.sort(key=lambda pair: pair.values[0])  # two workers compile for different kernels
    return pytest.mark.parametrize("kernel, case", pairs)


def check_all(op, kernel, case):
    """Values, states and gradients."""
    assert kernel == "auto" or kernel in serving(op, case)
    outputs, gradients = answers(op, kernel, case)
    truth(op, case).check_outputs(outputs)
    truth(op, case).check_gradients(gradients)


def check_calls_continue(op, kernel):
    """Pieces of a sequence, one of them empty, give what the whole of it gives."""
    expected, (*_, num_inputs, num_sequences) = truth(op, BOTH), OPS[op]
    tensors = list(expected.tensors.values())
    state, outputs = tensors[num_inputs:], []
    cut = np.random.default_rng(3).integers(1, BOTH.S)
    for piece in slice(0, cut), slice(cut, cut), slice(cut, BOTH.S):
        sequences = [x[:, piece] for x in tensors[:num_sequences]]
        inputs = sequences + tensors[num_sequences:num_inputs]
        flags = {name: flag[:, piece] for name, flag in BOTH.flags().items()}
        options = {"kernel": kernel, "return_state": True}
        h, state = call(op, OPS[op].ours, [*inputs, *state], flags, **options)
        outputs.append(h)
    expected.check_outputs([ops.concatenate(outputs, axis=1), *state])


def check_unknown_sizes(op, kernel):
    """Traced by TensorFlow for any batch size and any length, with gradients."""
    import tensorflow as tf

    expected, (*_, num_inputs, num_sequences) = truth(op, BOTH), OPS[op]
    tensors = list(expected.tensors.values())

    def spec(number, x):
        unknown = 2 if number < num_sequences else 1 if number >= num_inputs else 0
        return tf.TensorSpec([None] * unknown + list(x.shape[unknown:]), x.dtype)

    def outputs(tensors, flags):
        h, state = call(op, OPS[op].ours, tensors, flags, kernel=kernel, return_state=True)
        return [h, *state]

    any_flag = tf.TensorSpec([None, None], "bool")
    h_weight = tf.TensorSpec([None, None, *expected.weights[0].shape[2:]])
    state_weights = [tf.TensorSpec([None, *w.shape[1:]]) for w in expected.weights[1:]]
    run = tf.function(
        outputs_and_gradients(outputs, jit=False),
        autograph=False,
        input_signature=(
            [spec(number, x) for number, x in enumerate(tensors)],
            [h_weight, *state_weights],
            {"mask": any_flag, "reset": any_flag},
        ),
    )
    got, gradients = run(tensors, expected.weights, BOTH.flags())
    expected.check_outputs(got)
    expected.check_gradients(gradients)


def check_oracle(reference, inputs):
    """The complex step agrees with a difference quotient."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=y.shape) for y in reference(*inputs)]
    direction = [rng.normal(size=x.shape) for x in inputs]

    def loss(*x):
        return sum(np.sum(w * y) for w, y in zip(weights, reference(*x), strict=True))

    def at(t):
        return loss(*(x + t * d for x, d in zip(inputs, direction, strict=True)))

    step = 1e-6
    quotient = (at(step) - at(-step)) / (2 * step)
    exact = oracle.directional(loss, inputs, direction)
    terms = sum(np.sum(abs(w * y)) for w, y in zip(weights, reference(*inputs), strict=True))
    assert abs(quotient - exact) <= 1e-7 * abs(exact) + 4 * 2.0**-52 * terms / step
