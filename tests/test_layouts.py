"""Masked, packed and streamed runs are the unpadded, separate and whole ones, in any layout.

Layouts are drawn: which steps of two rows happen, where documents begin, where the calls are cut.
Each document by itself, without padding, in one call, says what is right: outputs, the states at
the end, and the gradients of all weights, inputs and initial states.
"""

import functools
import itertools
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from keras import ops, tree
from layer_cases import LAYERS, SIZES, UNITS, assert_close, gradients, noisy, numpy, random

from keras_xlstm.layers import XLSTMBlockStack

B, S, D = 2, 6, UNITS
STEPS = range(S)


@dataclass
class Layout:
    happens: list  # of rows of flags, as `mask` takes them
    starts: list  # the same, as `reset` takes them
    cuts: set  # the steps at which another call begins

    def documents(self, row):
        """Pairs of the steps of a document and whether it begins from a cleared state."""
        documents = [([], False)]
        for step in STEPS:
            if self.happens[row][step]:
                if self.starts[row][step]:
                    documents.append(([], True))
                documents[-1][0].append(step)
        return [(steps, cleared) for steps, cleared in documents if steps]

    def pieces(self):
        bounds = [0, *sorted(self.cuts), S]
        return [slice(*bound) for bound in itertools.pairwise(bounds)]


flags = st.lists(st.lists(st.booleans(), min_size=S, max_size=S), min_size=B, max_size=B)
layouts = st.builds(Layout, flags, flags, st.sets(st.sampled_from(STEPS[1:]), max_size=3))

ALL, NONE = [[True] * S] * B, [[False] * S] * B
THIRD = [[step == 2 for step in STEPS]] * B


@functools.cache
def new(kind):
    if kind in LAYERS:
        layer = LAYERS[kind](**SIZES[kind], return_sequences=True, return_state=True)
    else:
        layer = XLSTMBlockStack(2, num_heads=2, slstm_at=[1], chunk_size=3)
    layer.build((None, None, D))
    return noisy(layer, scale=0.5)


@functools.cache
def new_call(kind):
    """`call(weights, x, state, mask, reset) -> (y, next state)` of a layer."""
    layer = new(kind)
    options = {} if kind in LAYERS else {"return_state": True}
    others = [ops.convert_to_tensor(v) for v in layer.non_trainable_variables]

    def call(weights, x, state, mask, reset):
        (y, *state), _ = layer.stateless_call(
            weights, others, x, initial_state=state, mask=mask, reset=reset, **options
        )
        return y, state if kind in LAYERS else state[0]

    return compiled(call) if keras.backend.backend() == "jax" else call


def compiled(call):
    """Call and gradient in one program each for a length: eager JAX compiles every loop anew."""
    import jax

    def backward(inputs, slopes):
        tensors, flags = inputs[:3], inputs[3:]
        return *jax.vjp(lambda *tensors: call(*tensors, *flags), *tensors)[1](slopes), None, None

    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    forward, backward = jit(call), jit(backward)
    function = jax.custom_vjp(forward)
    function.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
    return function


def laid_out(kind, layout, weights, x, state):
    """Both rows at once, in as many calls as the layout has pieces."""
    outputs = []
    for piece in layout.pieces():
        mask, reset = (np.array(f, bool)[:, piece] for f in (layout.happens, layout.starts))
        y, state = new_call(kind)(weights, x[:, piece], state, mask, reset)
        outputs.append(y)
    return ops.concatenate(outputs, axis=1), state


def apart(kind, layout, weights, x, state):
    """Each document alone: outputs where steps happen, 0 elsewhere; each row's last state."""
    outputs, states = [], []
    for row in range(B):
        steps, parts, ours = [], [], state
        for document, cleared in layout.documents(row):
            every = np.ones((B, len(document)), bool)  # both rows run, and one counts
            begin = new(kind).get_initial_state(B) if cleared else ours
            y, ours = new_call(kind)(
                weights, ops.take(x, np.array(document), axis=1), begin, every, ~every
            )
            steps, parts = steps + document, [*parts, y[row]]
        placed = np.eye(S, dtype="float32")[:, steps]  # column p: which step is the p-th to happen
        outputs.append(ops.matmul(placed, ops.concatenate(parts)) if parts else ops.zeros((S, D)))
        states.append(tree.map_structure(lambda s, row=row: s[row], ours))
    return ops.stack(outputs), tree.map_structure(lambda *s: ops.stack(s), *states)


@pytest.mark.parametrize("kind", [*LAYERS, "stack"])
@example(Layout(ALL, NONE, set()))
@example(Layout(ALL, THIRD, {1, 2, 4}))
@example(Layout(THIRD, ALL, {3}))
@example(Layout(NONE, ALL, {3}))
@given(layouts)
def test_a_layout_changes_nothing(kind, layout):
    zeros = new(kind).get_initial_state(B)
    state = [0.5 * random(*s.shape, seed=i) for i, s in enumerate(tree.flatten(zeros))]
    weights = [ops.convert_to_numpy(w) for w in new(kind).trainable_variables]
    happens = np.array(layout.happens, bool)[..., None]

    def run(function):
        def loss(x, *rest):
            state = tree.pack_sequence_as(zeros, rest[: len(tree.flatten(zeros))])
            y, last = function(kind, layout, rest[len(tree.flatten(zeros)) :], x, state)
            outputs = [ops.where(happens, y, 0.0), *tree.flatten(last)]
            return sum(
                ops.sum(ops.multiply(y, random(*y.shape, seed=i))) for i, y in enumerate(outputs)
            ), outputs

        return gradients(loss, [random(B, S, D), *state, *weights])

    outputs, slopes = run(laid_out)
    wanted_outputs, wanted_slopes = run(apart)
    assert_close(outputs, wanted_outputs, rtol=1e-4)
    for slope, wanted in zip(slopes, wanted_slopes, strict=True):
        assert_close(slope, wanted, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(numpy(wanted)).max()))
