"""What holds of whatever is given: of all kernels that serve on a CPU, and of layers.

Calls are drawn by hypothesis: gates, masks, resets, where a sequence is cut, and the seed of all
other numbers. `python -m tests` draws few, in one size, so that programs are compiled once;
`pytest tests/test_properties.py --hypothesis-profile=long` draws many, in many sizes.

Equal means to the last bit, where the same numbers are added up in the same order; elsewhere, as
near to the oracle as `conformance.py` demands.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import conformance
import keras
import numpy as np
import pytest
from conformance import OPS, ROUNDING, Case, Truth, as_numpy, as_tensor, call
from hypothesis import given, note, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from keras import ops
from layer_cases import LAYERS, UNITS, D, new_layer, noisy, numpy, random

from keras_xlstm.layers import XLSTMBlockStack
from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

LONG = settings.get_current_profile_name() == "long"
BACKEND = keras.backend.backend()
SIZE = Case(S=6, chunk_size=4, B=3, NH=2, DHQK=3, DHHV=2)
each_op = pytest.mark.parametrize("op", OPS)


@dataclass
class Call:
    """A call of an operation: arrays by name, the state's last, and flags."""

    op: str
    case: Case
    inputs: dict
    state: dict
    flags: dict

    def _repr_pretty_(self, printer, cycle):
        """For hypothesis: what was drawn; all else follows from the case's seed."""
        gates = [np.round(x.reshape(*x.shape[:2], -1)[:, :, 0]).tolist() for x in self.gates()]
        flags = {name: flag.astype(int).tolist() for name, flag in self.flags.items()}
        printer.text(f"{self.op} {self.case}, i, f around {gates}, {flags}")

    def gates(self):
        """Views of the input gates and of the forget gates, (B, S, NH, ...)."""
        if self.op == "mlstm":
            return [self.inputs["i"], self.inputs["f"]]
        return [self.inputs["gates"][:, :, number] for number in range(2)]

    @property
    def arrays(self):
        return [*self.inputs.values(), *self.state.values()]

    @property
    def tensors(self):
        given = [as_tensor(x, self.case.dtype) for x in self.inputs.values()]
        return given + [as_tensor(x, "float32") for x in self.state.values()]

    def oracle(self, *arrays):
        options = {name: x for name, x in self.options().items() if name == "eps"}
        h, state = call(self.op, OPS[self.op].oracle, arrays, self.flags, **options)
        return [h, *state]

    def truth(self):
        lossy = 3 if LONG else 1
        truth = Truth(self.oracle, self.inputs, self.state, self.case.dtype, lossy=lossy)
        # A stabilizer is a logarithm: off by 1e-6 means that share of what it scales.
        m, allowed = truth.outputs[-1]
        truth.outputs[-1] = m, allowed + ROUNDING["float32"]
        return truth

    def weights(self):
        """Of outputs and states in a loss."""
        B, S, NH, DHHV = self.case.B, self.case.S, self.case.NH, self.case.DHHV
        rng, shapes = np.random.default_rng(3), [x.shape for x in self.state.values()]
        return [rng.normal(size=shape).astype("float32") for shape in [(B, S, NH, DHHV), *shapes]]

    def run(self, kernel, weights=None):
        """The outputs and the gradients of what they weigh, as arrays."""
        run = conformance.form(self.op, kernel, tuple(self.options().items()), False)
        outputs, slopes = run(self.tensors, weights or self.weights(), self.flags)
        return [numpy(x) for x in outputs], [numpy(x) for x in slopes]

    def forward(self, kernel, tensors=None, flags=None):
        run = forward(self.op, kernel, tuple(self.options().items()))
        return run(tensors or self.tensors, flags or self.flags)

    def options(self):
        return {name: getattr(self.case, name) for name in OPS[self.op].options}

    def sequences(self):
        """The names of the inputs that have steps."""
        return list(self.inputs)[: OPS[self.op].num_sequences]

    def kernels(self):
        for kernel in serving(self.op, replace(self.case, seed=0, state=True)):
            note(f"kernel {kernel}")
            yield kernel


@functools.cache
def forward(op, kernel, options, compiled=BACKEND == "jax"):
    """Compiled by default where eager is slow."""

    def run(tensors, flags):
        h, state = call(
            op, OPS[op].ours, tensors, flags, kernel=kernel, return_state=True, **dict(options)
        )
        return [h, *state]

    if not compiled:
        return run
    if BACKEND == "jax":
        import jax

        return jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(run, jit_compile=True, autograph=False)
    import torch

    return torch.compile(run, backend="aot_eager", dynamic=False)


serving = functools.cache(conformance.serving)

SIZES = [  # few enough to compile for
    SIZE,
    Case(S=1, B=1, NH=1, DHQK=1, DHHV=1),
    Case(S=2, chunk_size=1, B=2, NH=1, DHQK=1, DHHV=5, eps=0.1),
    Case(S=8, chunk_size=3, B=1, NH=3, DHQK=8, DHHV=2),
    Case(S=24, chunk_size=7, B=2, NH=1, DHQK=4, DHHV=4),
]


def cases(dtypes):
    seeds, dtype = st.integers(0, 2**20), st.sampled_from(dtypes)
    if not LONG:
        sizes, dtype = st.just(SIZE), st.just("float32")
    elif BACKEND == "torch":
        sizes = st.builds(
            Case,
            S=st.integers(1, 16),
            chunk_size=st.none() | st.integers(1, 30),
            B=st.integers(1, 3),
            NH=st.integers(1, 3),
            DHQK=st.integers(1, 8),
            DHHV=st.integers(1, 8),
            eps=st.sampled_from([1e-6, 0.1]),
        )
    else:
        sizes = st.sampled_from(SIZES)
    return st.builds(
        lambda size, seed, dtype: replace(size, seed=seed, dtype=dtype), sizes, seeds, dtype
    )


HIGH, LOW = {"float32": 1e4, "bfloat16": 50, "float16": 50}, (-50, -3, 0, 3, 50)


@st.composite
def calls(draw, op, dtypes=("float32",), levels=None):
    """Gates lie around levels, never exactly there: where two maxima tie there is no derivative."""
    case = draw(cases(dtypes))
    inputs, state = OPS[op].inputs(case)
    rng, shape = np.random.default_rng(case.seed), (case.B, case.S)
    levels = levels or (*LOW, -HIGH[case.dtype], HIGH[case.dtype])
    drawn = Call(op, case, inputs, state, {})
    for gate in drawn.gates():
        level = draw(arrays("float64", shape, elements=st.sampled_from(levels), fill=st.just(0)))
        gate[...] = level.reshape(*shape, *[1] * (gate.ndim - 2)) + rng.normal(size=gate.shape)
    flags = {name: draw(arrays(bool, shape)) for name in ("mask", "reset")}
    return replace(drawn, flags=flags)


SPOILT = np.nan, np.inf, -np.inf
tensor = functools.partial(as_tensor, dtype="float32")


def equal(got, wanted, what):
    np.testing.assert_array_equal(got, wanted, err_msg=what)


@each_op
@given(data=st.data())
def test_the_oracle_agrees(op, data):
    drawn = data.draw(calls(op, ["float32", "float32", "bfloat16", "float16"]))
    expected = drawn.truth()
    for kernel in drawn.kernels():
        run = conformance.form(op, kernel, tuple(drawn.options().items()), False)
        outputs, slopes = run(drawn.tensors, expected.weights, drawn.flags)
        expected.check_outputs(outputs)
        expected.check_gradients(slopes)


@each_op
@given(data=st.data())
def test_the_oracles_derivatives_are_difference_quotients(op, data):
    drawn = data.draw(calls(op, levels=(-3, 0, 3)))
    conformance.check_oracle(drawn.oracle, drawn.arrays)


@each_op
@given(data=st.data())
def test_no_step_sees_a_later_one(op, data):
    drawn = data.draw(calls(op))
    t = data.draw(st.integers(0, drawn.case.S - 1))
    later = np.arange(drawn.case.S) >= t
    inputs, rng = dict(drawn.inputs), np.random.default_rng(1)
    for name in drawn.sequences():
        x = inputs[name].copy()
        x[:, later] = rng.normal(size=x[:, later].shape) * 10
        inputs[name] = x
    flags = {name: flag ^ later for name, flag in drawn.flags.items()}
    for kernel in drawn.kernels():
        (h, *_), _ = drawn.run(kernel)
        (changed, *_), _ = replace(drawn, inputs=inputs, flags=flags).run(kernel)
        equal(changed[:, :t], h[:, :t], kernel)


@given(data=st.data())
def test_any_chunks_give_the_same(data):
    drawn = data.draw(calls("mlstm"))
    expected = drawn.truth()
    sizes = st.integers(1, 30) if LONG else st.sampled_from([1, 6])
    case = replace(drawn.case, chunk_size=data.draw(sizes))
    for kernel in drawn.kernels():
        expected.check_outputs(replace(drawn, case=case).forward(kernel))


@each_op
@given(data=st.data())
def test_calls_go_on_where_others_stopped(op, data):
    drawn = data.draw(calls(op))
    steps = st.integers(0, drawn.case.S) if LONG else st.sampled_from([0, 2, 4])
    cuts = sorted(data.draw(st.lists(steps, max_size=3)))
    expected, tensors = drawn.truth(), drawn.tensors
    *_, num_inputs, num_sequences = OPS[op]
    for kernel in drawn.kernels():
        outputs, state = [], tensors[num_inputs:]
        for start, stop in itertools.pairwise([0, *cuts, drawn.case.S]):
            sequences = [x[:, start:stop] for x in tensors[:num_sequences]]
            flags = {name: flag[:, start:stop] for name, flag in drawn.flags.items()}
            inputs = [*sequences, *tensors[num_sequences:num_inputs], *state]
            h, *state = drawn.forward(kernel, inputs, flags)
            outputs.append(h)
        expected.check_outputs([ops.concatenate(outputs, axis=1), *state])


@each_op
@given(data=st.data())
def test_padding_may_stand_anywhere(op, data):
    """The same steps at other places among steps that do not happen: the same numbers."""
    drawn = data.draw(calls(op))
    B, S = drawn.flags["mask"].shape
    places = [data.draw(st.permutations(range(S))) for _ in range(B)]
    order = np.argsort(~drawn.flags["mask"], axis=1, kind="stable")  # those that happen first
    whither = np.empty_like(order)
    for row, count, place in zip(whither, drawn.flags["mask"].sum(1), places, strict=True):
        row[:] = [*sorted(place[:count]), *place[count:]]
    rows = np.arange(B)[:, None]

    def move(x, whence, whither):
        y = np.empty_like(x)
        y[rows, whither] = x[rows, whence]
        return y

    moved = {name: move(drawn.inputs[name], order, whither) for name in drawn.sequences()}
    flags = {name: move(flag, order, whither) for name, flag in drawn.flags.items()}
    expected = drawn.truth()
    for kernel in drawn.kernels():
        h, *state = replace(drawn, inputs=drawn.inputs | moved, flags=flags).forward(kernel)
        h = ops.convert_to_tensor(move(ops.convert_to_numpy(h), whither, order))
        expected.check_outputs([h, *state])


@each_op
@given(data=st.data())
def test_what_masked_steps_hold_is_without_effect(op, data):
    drawn = data.draw(calls(op))
    masked, rng, inputs = ~drawn.flags["mask"], np.random.default_rng(1), dict(drawn.inputs)
    for name in drawn.sequences():
        x = inputs[name].copy()
        x[masked] = rng.normal(size=x[masked].shape) * 100
        inputs[name] = x
    flags = drawn.flags | {"reset": drawn.flags["reset"] ^ masked}
    for kernel in drawn.kernels():
        outputs, slopes = drawn.run(kernel)
        others, other_slopes = replace(drawn, inputs=inputs, flags=flags).run(kernel)
        for x, y in zip([*outputs, *slopes], [*others, *other_slopes], strict=True):
            equal(y, x, kernel)
        equal(outputs[0][masked], 0, kernel)
        for slope in slopes[: OPS[op].num_sequences]:
            equal(slope[masked], 0, kernel)


@each_op
@given(data=st.data())
def test_rows_do_not_touch_each_other(op, data):
    """Not even by NaN or infinity, at one step or at all, and neither in gradients."""
    drawn = data.draw(calls(op))
    B, S = drawn.flags["mask"].shape
    row, bad = data.draw(st.integers(0, B - 1)), data.draw(st.sampled_from(SPOILT))
    name = data.draw(st.sampled_from([*drawn.sequences(), *drawn.state, "all"]))
    step = data.draw(st.sampled_from([slice(None), 0, S - 1]))
    inputs, state = (
        {name: x.copy() for name, x in part.items()} for part in (drawn.inputs, drawn.state)
    )
    for key in drawn.sequences():
        if name in (key, "all"):
            inputs[key][row, step] = bad
    for key in state:
        if name in (key, "all"):
            state[key][row] = bad
    others = np.arange(B) != row
    for kernel in drawn.kernels():
        good, spoilt = (x.run(kernel) for x in (drawn, replace(drawn, inputs=inputs, state=state)))
        for number, (x, y) in enumerate(zip(good[0], spoilt[0], strict=True)):
            equal(y[others], x[others], f"{kernel}, output {number}")
        for key, x, y in zip([*inputs, *state], good[1], spoilt[1], strict=True):
            if key in drawn.sequences() or key in state:
                equal(y[others], x[others], f"{kernel}, gradient of {key}")


HEADS = {"recurrent_kernel": 0, "bias": 1, "gates": 3}  # the axis of heads, 2 in sequences


@each_op
@given(data=st.data())
def test_heads_may_stand_in_any_order(op, data):
    drawn = data.draw(calls(op))
    order = data.draw(st.permutations(range(drawn.case.NH)))
    inputs = {key: x.take(order, HEADS.get(key, 2)) for key, x in drawn.inputs.items()}
    state = {key: x.take(order, 1) for key, x in drawn.state.items()}
    expected, back = drawn.truth(), np.argsort(order)
    weights = [w.take(order, 1 + (n == 0)) for n, w in enumerate(expected.weights)]
    axes = [HEADS.get(key, 2) for key in inputs] + [1] * len(state)
    for kernel in drawn.kernels():
        outputs, slopes = replace(drawn, inputs=inputs, state=state).run(kernel, weights)
        outputs = [y.take(back, 1 + (n == 0)) for n, y in enumerate(outputs)]
        slopes = [y.take(back, axis) for y, axis in zip(slopes, axes, strict=True)]
        expected.check_outputs([as_tensor(outputs[0], drawn.case.dtype), *map(tensor, outputs[1:])])
        expected.check_gradients([tensor(y) for y in slopes])


@each_op
@given(data=st.data())
def test_a_states_scale_is_its_stabilizers(op, data):
    """(a C, a n, m - log a) is the state (C, n, m): exp(m) C and exp(m) n are what it stands for.

    So says the recurrence, in which exp(lf + m - m') multiplies C: the sign is minus. Only eps,
    which is added to what is scaled, tells them apart, so that it is 0 here.
    """
    drawn = data.draw(calls(op))
    log_a, state = data.draw(st.floats(-5, 5)), dict(drawn.state)
    scaled = ("C", "n") if op == "mlstm" else ("c", "n")
    state |= {name: state[name] * np.exp(log_a) for name in scaled}
    state["m"] = state["m"] - log_a
    drawn = replace(drawn, case=replace(drawn.case, eps=0.0))
    other = replace(drawn, state=state)

    # Of the oracle, nearly exactly.
    (h, *end), (other_h, *other_end) = (x.oracle(*x.arrays) for x in (drawn, other))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(other_h, h)
    names, moved = list(state), np.exp(other_end[-1] - end[-1])
    for name, x, y in zip(names, end, other_end, strict=True):
        if name in scaled:
            close(y * moved.reshape(moved.shape + (1,) * (y.ndim - moved.ndim)), x)

    exact, allowed = drawn.truth().outputs[0]
    expected = other.truth()
    for kernel in drawn.kernels():
        outputs = other.forward(kernel)
        expected.check_outputs(outputs)
        conformance.check(kernel, as_numpy(outputs[0]), exact, allowed + expected.outputs[0][1])


@pytest.mark.skipif(BACKEND == "torch" and not LONG, reason="torch compiles for long")
@each_op
@given(data=st.data())
def test_compiled_and_eager_agree(op, data):
    drawn = data.draw(calls(op))
    expected, options = drawn.truth(), tuple(drawn.options().items())
    for kernel in drawn.kernels():
        for compiled in (False, True):
            run = forward(op, kernel, options, compiled)
            expected.check_outputs(run(drawn.tensors, drawn.flags))


@functools.cache
def layer_run(kind):
    """`run([x], [weights], flags) -> ([y], [gradient of x])` of a layer or stack."""
    if kind in LAYERS:
        layer = new_layer(kind, return_sequences=True, zero_output_for_mask=True)
    else:
        layer = XLSTMBlockStack(2, num_heads=2, slstm_at=[1], block_style=kind, chunk_size=4)
        layer.build((None, None, WIDTHS[kind]))
        noisy(layer, scale=0.3)
    run = conformance.outputs_and_gradients(lambda inputs, flags: [layer(*inputs, **flags)], False)

    def numbers(x, weights, flags):
        (y,), (slope,) = run([ops.convert_to_tensor(x)], [weights], flags)
        return numpy(y), numpy(slope)

    return numbers


WIDTHS = {"slstm": D, "mlstm": D, "large": 8, "original": 8}  # of the inputs
OUTPUTS = WIDTHS | dict.fromkeys(LAYERS, UNITS)


@st.composite
def layer_calls(draw, kind):
    B, S = 3, draw(st.integers(1, 12)) if LONG else 6
    x = random(B, S, WIDTHS[kind], seed=draw(st.integers(0, 999)))
    flags = {name: draw(arrays(bool, (B, S))) for name in ("mask", "reset")}
    return x, random(B, S, OUTPUTS[kind], seed=1), flags


each_kind = pytest.mark.parametrize("kind", WIDTHS)


@each_kind
@given(data=st.data())
def test_layers_do_not_look_ahead(kind, data):
    """Outputs do not depend on what comes later, and their gradients say so too."""
    x, weights, flags = data.draw(layer_calls(kind))
    t = data.draw(st.integers(0, x.shape[1]))
    later = np.arange(x.shape[1]) >= t
    weights[:, later] = 0
    y, slope = layer_run(kind)(x, weights, flags)
    changed = np.where(later[:, None], 10 - 3 * x, x)
    other_flags = {name: flag ^ later for name, flag in flags.items()}
    other, other_slope = layer_run(kind)(changed, weights, other_flags)
    equal(other[:, :t], y[:, :t], "outputs")
    equal(other_slope[:, :t], slope[:, :t], "gradients")
    equal(slope[:, t:], 0, "gradients of what comes later")


@each_kind
@given(data=st.data())
def test_rows_of_layers_do_not_touch_each_other(kind, data):
    x, weights, flags = data.draw(layer_calls(kind))
    row, bad = data.draw(st.integers(0, 2)), data.draw(st.sampled_from(SPOILT))
    step = data.draw(st.sampled_from([slice(None), 0, -1]))
    spoilt, others = x.copy(), np.arange(3) != row
    spoilt[row, step] = bad
    both = (layer_run(kind)(x, weights, flags) for x in (x, spoilt))
    for good, other in zip(*both, strict=True):
        equal(other[others], good[others], kind)


@functools.cache
def language_model(style):
    options = dict(block_style=style, slstm_at=[1], chunk_size=4, ffn_round_up_to=8)
    return noisy(XLSTMCausalLM(XLSTMBackbone(16, 2, 8, 2, **options)), scale=0.3)


def read(model, tokens, mask, cuts=()):
    """Logits where there are tokens, in order, and the last states; in pieces."""
    pieces, cache = [], None
    for start, stop in itertools.pairwise([0, *cuts, tokens.shape[1]]):
        piece = slice(start, stop)
        logits, _, cache = model.call_with_cache(
            tokens[:, piece], cache, padding_mask=mask[:, piece]
        )
        pieces.append(numpy(logits))
    return [np.concatenate(pieces, axis=1)[mask], *map(numpy, keras.tree.flatten(cache))]


@pytest.mark.parametrize("style", ["large", "original"])
@given(data=st.data())
def test_language_models_read_each_row_as_if_alone(style, data):
    """Padding may stand anywhere and hold anything, and the text come in any pieces."""
    B, S = 3, data.draw(st.integers(1, 12)) if LONG else 6
    tokens = data.draw(arrays("int32", (B, S), elements=st.integers(0, 15)))
    mask = data.draw(arrays(bool, (B, S)))
    model = language_model(style)
    expected = read(model, tokens, mask)

    held = np.where(mask, tokens, 15 - tokens)
    for x, y in zip(read(model, held, mask), expected, strict=True):
        equal(x, y, "what padding holds")

    order = np.argsort(~mask, axis=1, kind="stable")
    moved = [np.take_along_axis(x, order, axis=1) for x in (tokens, mask)]
    places = st.integers(1, max(1, S - 1)) if LONG else st.sampled_from([2, 4])
    cuts = sorted(data.draw(st.sets(places, max_size=min(2, S - 1))))
    for again in (read(model, *moved), read(model, tokens, mask, cuts)):
        for x, y in zip(again, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)

    row, t = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, S))
    later = np.zeros((B, S), bool)
    later[row, t:] = True
    other = read(model, np.where(later, 15 - tokens, tokens), mask ^ later)
    kept, still = ~later[mask], ~later[mask ^ later]
    equal(other[0][still], expected[0][kept], "other rows and later tokens")
