"""One suite for every form and every registered kernel, on every backend.

`test_mlstm.py` and `test_slstm.py` run it for all of `kernels.available(op)`, those of other
packages included, on the cases that a kernel does not object to.

What is allowed: 16 times what float32 costs the equations themselves (how far the oracle in
float32 is from the oracle in float64, on the same inputs), and one rounding of the output. For
inputs in bfloat16 and float16: twice what rounding them once costs (how far the oracle's answer
moves), and one rounding of the output. The same for derivatives, by complex step.
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
    eps: float = 1e-6
    B: int = 2
    NH: int = 3
    DHQK: int = 5
    DHHV: int = 7

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
            "some": rng.random(steps.shape) < 0.15,  # masked steps and neighbours among them
        }
        return {"mask": masks[self.mask], "reset": resets[self.reset]}


ALIKE = Case(S=65, chunk_size=16, mask="full", reset="never")  # one compilation serves them all
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
    "bfloat16": replace(BOTH, dtype="bfloat16"),
    "float16": replace(BOTH, dtype="float16"),
    "no-step": Case(S=0),
    "one-step": Case(S=1, mask="full", reset="never"),
    "one-step-masked": Case(S=1, mask="empty", reset="first"),
    "one-step-reset": Case(S=1, mask="full", reset="first"),
    "one-step-fresh": Case(S=1, state=False),
    "one-step-bfloat16": Case(S=1, dtype="bfloat16"),
    "two-steps-fresh-narrow": Case(S=2, state=False, B=1, NH=1, DHQK=1, DHHV=1),
    "63-mask": Case(S=63, mask="right"),
    "64-fresh": Case(S=64, state=False),
    "65-fresh-reset": Case(S=65, state=False, reset="some"),
    "200-fresh-wide": Case(S=200, state=False, B=1, NH=2, DHQK=24, DHHV=40),
}
MLSTM_CASES = CASES | {
    "chunks-of-1": replace(BOTH, chunk_size=1),
    "chunks-of-17-eps": replace(BOTH, chunk_size=17, eps=0.1),
    "chunk-of-100": replace(BOTH, chunk_size=100),
    "200-chunks-of-64-powers": replace(BOTH, S=200, chunk_size=64, DHQK=16, DHHV=32),
}


def gate(rng, shape, at):
    """Around `at`, never exactly there: where two maxima tie there is no derivative."""
    return rng.normal(size=shape) + (rng.choice([-50, 0, 50], size=shape) if at is None else at)


def mlstm_inputs(case):
    B, S, NH, DHQK, DHHV = case.B, case.S, case.NH, case.DHQK, case.DHHV
    rng = np.random.default_rng(0)
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
    rng = np.random.default_rng(0)
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
    "slstm": Op(CASES, slstm_inputs, slstm, oracle.slstm, (), 3, 1),
}


class Truth:
    """What a NumPy function answers, its derivatives, and how far from both one may be.

    Args:
        reference: callable, from arrays to a list of arrays.
        inputs: dict, name to float64 array, of what is given in `dtype`.
        state: dict, name to float64 array, of what is given in float32.
        dtype: string.
    """

    def __init__(self, reference, inputs, state, dtype):
        rng, self.dtype = np.random.default_rng(2), dtype
        self.tensors = {name: as_tensor(x, dtype) for name, x in inputs.items()}
        self.tensors |= {name: as_tensor(x, "float32") for name, x in state.items()}
        exact = [as_numpy(x) for x in self.tensors.values()]
        if dtype == "float32":
            inexact = [x.astype("float32") for x in exact]
        else:
            inexact = [*inputs.values(), *state.values()]

        outputs = [reference(*x) for x in (exact, inexact)]
        self.outputs = [self.around(*pair) for pair in zip(*outputs, strict=True)]
        self.weights = [rng.normal(size=y.shape).astype("float32") for y in outputs[0]]
        self.directions = [rng.normal(size=(3, *x.shape)) for x in exact]

        def loss(*x):
            return sum(np.sum(w * y) for w, y in zip(self.weights, reference(*x), strict=True))

        def derivatives(inputs, j):
            still = [np.zeros_like(x) for x in inputs]
            moves = [[*still[:j], d.astype(still[j].dtype), *still[j + 1 :]] for d in directions[j]]
            return np.array([oracle.directional(loss, inputs, move) for move in moves])

        directions = self.directions
        self.derivatives = [
            self.around(derivatives(exact, j), derivatives(inexact, j)) for j in range(len(exact))
        ]

    def around(self, exact, inexact):
        """The answer, and the distance from it that is allowed."""
        noise, scale = (np.max(np.abs(x), initial=0) for x in (exact - inexact, exact))
        return exact, TIMES[self.dtype] * noise + ROUNDING[self.dtype] * scale

    def check_outputs(self, outputs):
        for number, (y, (exact, allowed)) in enumerate(zip(outputs, self.outputs, strict=True)):
            assert tuple(y.shape) == exact.shape
            check(f"output {number}", as_numpy(y), exact, allowed)

    def check_gradients(self, gradients):
        rows = zip(self.tensors, gradients, self.directions, self.derivatives, strict=True)
        for name, gradient, directions, (exact, allowed) in rows:
            got = np.array([np.sum(as_numpy(gradient) * d) for d in directions])
            check(f"derivative for {name}", got, exact, allowed + UNDERFLOW)


def check(what, got, exact, allowed):
    error = np.max(np.abs(got - exact), initial=0)
    assert error <= allowed, f"{what}: off by {error:.1e}, allowed {allowed:.1e}"  # NaN fails too


def as_tensor(x, dtype):
    return ops.cast(ops.convert_to_tensor(x.astype("float32")), dtype)


def as_numpy(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")


def outputs_and_gradients(f):
    """`g(tensors, weights, flags) -> outputs of f, gradients of sum(weights * outputs)`.

    Compiled where the backend compiles. `f` takes a list of tensors and a dict of flags.
    """

    def loss(tensors, weights, flags):
        outputs = f(tensors, flags)
        terms = (ops.sum(w * ops.cast(y, "float32")) for w, y in zip(weights, outputs, strict=True))
        return sum(terms), outputs

    if keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

        def run(tensors, weights, flags):
            (_, outputs), gradients = compiled(tensors, weights, flags)
            return outputs, gradients

    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True, autograph=False)
        def run(tensors, weights, flags):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                total, outputs = loss(tensors, weights, flags)
            return outputs, tape.gradient(total, tensors, unconnected_gradients="zero")

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
def compiled(op, kernel, options):
    def run(tensors, flags):
        h, state = call(
            op, OPS[op].ours, tensors, flags, kernel=kernel, return_state=True, **dict(options)
        )
        return [h, *state]

    return outputs_and_gradients(run)


@functools.cache
def answers(op, kernel, case):
    expected = truth(op, case)
    options = tuple((name, getattr(case, name)) for name in OPS[op].options)
    tensors = list(expected.tensors.values())
    return compiled(op, kernel, options)(tensors, expected.weights, case.flags())


def check_values_and_states(op, kernel, case):
    truth(op, case).check_outputs(answers(op, kernel, case)[0])


def check_gradients(op, kernel, case):
    truth(op, case).check_gradients(answers(op, kernel, case)[1])


def served(op):
    """Parametrizes a test over the kernels of `op`, each with the cases that it does not refuse."""
    pairs = []
    for name, case in OPS[op].cases.items():
        inputs, state = OPS[op].inputs(case)
        tensors = [as_tensor(x, case.dtype) for x in inputs.values()]
        tensors += [as_tensor(x, "float32") for x in state.values()]
        for kernel in kernels.available(op):
            verdicts = call(op, kernels.explain, tensors, case.flags(), op=op, kernel=kernel)
            if f"* {kernel}:" in verdicts:
                pairs.append(pytest.param(kernel, case, id=f"{kernel}-{name}"))
    return pytest.mark.parametrize("kernel, case", pairs)
