"""The fast kernels under each framework's transformations, held to the NumPy oracle."""

import functools
from dataclasses import replace

import conformance
import keras
import numpy as np
import oracle
import pytest
from conformance import OPS, Case, as_numpy, truth
from keras import ops
from layer_cases import LAYERS, NOISE, B, D, S, new_layer, random

from keras_xlstm import kernels
from keras_xlstm.ops import mlstm_chunks, slstm_loop, soft_cap
from keras_xlstm.ops.linear import cross_entropy

pytestmark = pytest.mark.compiled
BACKEND = keras.backend.backend()
if BACKEND == "torch":
    import torch
elif BACKEND == "jax":
    import jax
else:
    import tensorflow as tf

on_torch, on_jax, on_tensorflow = (
    pytest.mark.skipif(name != BACKEND, reason=f"transformations of {name}")
    for name in ("torch", "jax", "tensorflow")
)
each_op = pytest.mark.parametrize("op", OPS)

# Two whole chunks and a part of one; masked and reset steps.
CASE = Case(S=20, chunk_size=8, mask="holes", reset="some")
FAST = {op: conformance.serving(op, CASE)[0] for op in OPS}
# Over rows of the batch: its inputs, and its states; the weights of sLSTM are those of all rows.
ROWS = {"mlstm": [0] * 8, "slstm": [0, None, None, 0, 0, 0, 0]}


def given(op, case=CASE):
    """The arguments of `outputs` and, with weights, of `loss`."""
    expected = truth(op, case)
    weights = [ops.convert_to_tensor(w) for w in expected.weights]
    return list(expected.tensors.values()), flags(case), weights


def flags(case=CASE):
    return [ops.convert_to_tensor(flag) for flag in case.flags().values()]


def outputs(op, tensors, flags):
    """h and the state, by the fast kernel."""
    options = {"chunk_size": CASE.chunk_size} if op == "mlstm" else {}
    flags = dict(zip(("mask", "reset"), flags, strict=True))
    options |= {"kernel": FAST[op], "return_state": True}
    h, state = conformance.call(op, OPS[op].ours, tensors, flags, **options)
    return [h, *state]


def loss(op, tensors, flags, weights):
    pairs = zip(weights, outputs(op, tensors, flags), strict=True)
    return sum(ops.sum(w * ops.cast(y, "float32")) for w, y in pairs)


def outputs_of_row(op, tensors, flags):
    tensors = [x if axis is None else x[None] for x, axis in zip(tensors, ROWS[op], strict=True)]
    return [y[0] for y in outputs(op, tensors, [flag[None] for flag in flags])]


def loss_of_row(op, tensors, flags, weights):
    pairs = zip(weights, outputs_of_row(op, tensors, flags), strict=True)
    return sum(ops.sum(w * y) for w, y in pairs)


def over_rows(op, gradients):
    """The gradients of all rows: what they share gets the sum of theirs."""
    return [
        ops.sum(x, 0) if axis is None else x for x, axis in zip(gradients, ROWS[op], strict=True)
    ]


def move(op):
    """A direction for all tensors at once."""
    return [ops.convert_to_tensor(d[0].astype("float32")) for d in truth(op, CASE).directions]


def slope(gradients, directions):
    return sum(ops.sum(g * d) for g, d in zip(gradients, directions, strict=True))


@functools.cache
def second_derivatives(op):
    """Of the loss, in float64: along `move`, and then for one tensor after the other."""
    expected = truth(op, CASE)
    inputs = [as_numpy(x) for x in expected.tensors.values()]
    directions = [as_numpy(d) for d in move(op)]

    def along(j, step=1e-5):
        ahead, back = (
            [*inputs[:j], inputs[j] + by * expected.directions[j][1], *inputs[j + 1 :]]
            for by in (step, -step)
        )
        rise = np.subtract(
            *(oracle.directional(expected.loss, x, directions) for x in (ahead, back))
        )
        return rise / (2 * step)

    return np.array([along(j) for j in range(len(inputs))])


def check_second(op, gradients):
    exact, directions = second_derivatives(op), truth(op, CASE).directions
    pairs = zip(gradients, directions, strict=True)
    got = np.array([np.sum(as_numpy(g) * d[1]) for g, d in pairs])
    # Sums of thousands of products in float32, of terms larger than what they add up to.
    conformance.check("second derivative", got, exact, 1e-4 * np.max(np.abs(exact)))


def transforms():
    """Of torch and JAX: `grad`, and `vmap(function, axes)`."""
    if BACKEND == "torch":
        return torch.func.grad, torch.func.vmap

    def vmap(function, axes):
        mapped = jax.vmap(function, in_axes=axes)
        return jax.jit(mapped, compiler_options={"xla_backend_optimization_level": 0})

    return jax.grad, vmap


functional = pytest.mark.skipif(
    BACKEND == "tensorflow", reason="TensorFlow has tapes and no transformations of functions"
)


@functional
@each_op
def test_vmap(op):
    _, vmap = transforms()
    tensors, flags, _ = given(op)
    got = vmap(functools.partial(outputs_of_row, op), (ROWS[op], 0))(tensors, flags)
    truth(op, CASE).check_outputs(got)


@functional
@each_op
def test_gradients_of_each_sample(op):
    """And their gradients."""
    grad, vmap = transforms()

    def along(tensors, flags, weights, directions):
        first = grad(functools.partial(loss_of_row, op))(tensors, flags, weights)
        return slope(first, directions), first

    each = vmap(grad(along, has_aux=True), (ROWS[op], 0, 0, ROWS[op]))
    second, first = (over_rows(op, x) for x in each(*given(op), move(op)))
    truth(op, CASE).check_gradients(first)
    check_second(op, second)


@functional
@each_op
def test_gradient_of_gradient(op):
    grad, _ = transforms()
    directions = move(op)

    def along(tensors, *rest):
        first = grad(functools.partial(loss, op))(tensors, *rest)
        return slope(first, directions), first

    second, first = grad(along, has_aux=True)(*given(op))
    truth(op, CASE).check_gradients(first)
    check_second(op, second)


@functional
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_a_layer_for_each_sample(kind):
    grad, vmap = transforms()
    layer = new_layer(kind)
    x = keras.random.normal((B, S, D))
    weights = [ops.stop_gradient(w.value) for w in layer.trainable_variables]
    others = [w.value for w in layer.non_trainable_variables]

    def loss(weights, x):
        y, _ = layer.stateless_call(weights, others, x)
        return ops.sum(y)

    each = vmap(grad(loss), (None, 0))(weights, x[:, None])
    for got, whole in zip(each, grad(loss)(weights, x), strict=True):
        np.testing.assert_allclose(as_numpy(got).sum(0), as_numpy(whole), **NOISE)


@functional
@pytest.mark.parametrize("kind", [*LAYERS, "loss of logits"])
def test_jacobian(kind):
    """One gradient for each output, all at once, beside the gradient of their sum."""
    x = ops.convert_to_tensor(random(1, 5, D))

    def loss_of_logits(logits):
        return cross_entropy(soft_cap(logits, 3.0), ops.arange(5)[None] % D)

    function = new_layer(kind) if kind in LAYERS else loss_of_logits
    grad, _ = transforms()
    jacobian = torch.func.jacrev if BACKEND == "torch" else jax.jacrev
    each = as_numpy(jacobian(function)(x)).reshape(-1, *x.shape)
    whole = grad(lambda x: ops.sum(function(x)))(x)
    np.testing.assert_allclose(each.sum(0), as_numpy(whole), **NOISE)


@on_torch
@each_op
def test_backward_of_backward(op):
    tensors, flags, weights = given(op)
    tensors = [x.detach().requires_grad_() for x in tensors]
    first = torch.autograd.grad(loss(op, tensors, flags, weights), tensors, create_graph=True)
    truth(op, CASE).check_gradients([x.detach() for x in first])
    check_second(op, torch.autograd.grad(slope(first, move(op)), tensors))


@on_torch
@each_op
def test_gradient_of_one_input_alone(op):
    tensors, flags, weights = given(op)
    gradients = []
    for number, x in enumerate(tensors):
        x = x.detach().requires_grad_()
        inputs = [*tensors[:number], x, *tensors[number + 1 :]]
        gradients += torch.autograd.grad(loss(op, inputs, flags, weights), [x])
    truth(op, CASE).check_gradients(gradients)


@on_torch
@each_op
@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_without_gradients(op, mode):
    tensors, flags, _ = given(op)
    tensors = [x.detach().requires_grad_() for x in tensors]
    with getattr(torch, mode)():
        got = outputs(op, tensors, flags)
    assert not any(y.requires_grad for y in got)
    truth(op, CASE).check_outputs(got)


@on_torch
@each_op
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(op, use_reentrant):
    tensors, flags, weights = given(op)
    tensors = [x.detach().requires_grad_() for x in tensors]

    def function(*tensors):
        return loss(op, tensors, flags, weights)

    total = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=use_reentrant)
    total.backward()
    truth(op, CASE).check_gradients([x.grad for x in tensors])


@on_torch
@each_op
def test_autocast_changes_nothing(op):
    tensors, flags, weights = given(op)
    tensors = [x.detach().requires_grad_() for x in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        got = outputs(op, tensors, flags)
        truth(op, CASE).check_outputs([y.detach() for y in got])
        gradients = torch.autograd.grad(slope(got, weights), tensors, create_graph=True)
        truth(op, CASE).check_gradients([x.detach() for x in gradients])
        second = torch.autograd.grad(slope(gradients, move(op)), tensors)
    check_second(op, second)


@on_torch
@each_op
def test_compile(op):
    """As one graph, but for the sLSTM in plain torch, whose loop stays outside of it."""
    tensors, flags, weights = given(op)
    tensors = [x.detach().requires_grad_() for x in tensors]
    in_one = (op, FAST[op]) != ("slstm", "torch")
    compiled = torch.compile(functools.partial(outputs, op), backend="aot_eager", fullgraph=in_one)
    got = compiled(tensors, flags)
    truth(op, CASE).check_outputs([y.detach() for y in got])
    gradients = torch.autograd.grad(slope(got, weights), tensors)
    truth(op, CASE).check_gradients(gradients)


@on_torch
@each_op
def test_forward_mode_is_refused(op):
    tensors, flags, _ = given(op)
    with pytest.raises(RuntimeError, match="forward mode AD"):
        torch.func.jvp(lambda *x: outputs(op, x, flags), tuple(tensors), tuple(move(op)))


@on_jax
@each_op
def test_forward_mode_is_refused_by_jax(op):
    tensors, flags, _ = given(op)
    with pytest.raises(TypeError, match="forward-mode .* custom_vjp"):
        jax.jvp(lambda *x: outputs(op, x, flags), tensors, move(op))


@on_jax
@each_op
def test_checkpoint_in_jit(op):
    function = jax.checkpoint(functools.partial(loss, op))
    truth(op, CASE).check_gradients(jax.jit(jax.grad(function))(*given(op)))


@on_jax
@each_op
def test_shapes_without_numbers(op):
    tensors, flags, _ = given(op)
    shapes = jax.eval_shape(functools.partial(outputs, op), tensors, flags)
    for shape, (y, _) in zip(shapes, truth(op, CASE).outputs, strict=True):
        assert shape.shape == y.shape and shape.dtype == "float32"


if BACKEND == "tensorflow":
    MODES = {
        "eager": lambda function, **options: function,
        "graph": functools.partial(tf.function, autograph=False),
        "xla": functools.partial(tf.function, autograph=False, jit_compile=True),
    }


@on_tensorflow
@each_op
@pytest.mark.parametrize("mode", ["eager", pytest.param("graph", marks=pytest.mark.long), "xla"])
def test_gradient_of_gradient_on_tapes(op, mode):
    def run(tensors, flags, weights, directions):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                got = outputs(op, tensors, flags)
                total = slope(got, weights)
            first = inner.gradient(total, tensors)
            along = slope(first, directions)
        return got, first, outer.gradient(along, tensors)

    got, first, second = MODES[mode](run)(*given(op), move(op))
    truth(op, CASE).check_outputs(got)
    truth(op, CASE).check_gradients(first)
    check_second(op, second)


@on_tensorflow
@each_op
@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_unknown_batch_size(op, mode):
    def spec(x, axis=0):
        return tf.TensorSpec(x.shape if axis is None else [None, *x.shape[1:]], x.dtype)

    def run(tensors, flags, weights):
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            got = outputs(op, tensors, flags)
            total = slope(got, weights)
        return got, tape.gradient(total, tensors)

    tensors, flags, weights = given(op)
    signature = (
        [spec(*pair) for pair in zip(tensors, ROWS[op], strict=True)],
        [spec(flag) for flag in flags],
        [spec(w) for w in weights],
    )
    got, gradients = MODES[mode](run, input_signature=signature)(tensors, flags, weights)
    truth(op, CASE).check_outputs(got)
    truth(op, CASE).check_gradients(gradients)


@on_tensorflow
@each_op
def test_sizes_are_known_after_a_call_of_unknown_batch_size(op):
    """TensorFlow serves a call by what it traced for another, where that fits."""
    tensors, _, _ = given(op)
    for sizes in (None, B):
        specs = [
            tf.TensorSpec(x.shape if axis is None else [sizes, *x.shape[1:]])
            for x, axis in zip(tensors, ROWS[op], strict=True)
        ]
        run = tf.function(lambda *x: outputs(op, x, flags()), autograph=False)
        shapes = [y.shape.as_list() for y in run.get_concrete_function(*specs).outputs]
    assert shapes == [y.shape.as_list() for y in run(*tensors)]


@on_tensorflow
@each_op
def test_unknown_length_is_explained(op):
    """What the plain form then computes, `test_unknown_sizes` looks at."""
    verdicts = []

    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([2, None, *x.shape[2:]]) for x in given(op)[0][: OPS[op].num_sequences]
        ],
    )
    def run(*sequences):
        weights = given(op)[0][OPS[op].num_sequences : OPS[op].num_inputs]
        verdicts.append(kernels.explain(*sequences, *weights, op=op))

    run.get_concrete_function()
    assert f"- {FAST[op]}: needs a length that is known when it is traced" in verdicts[0]
    assert f"* {FAST[op]}" not in verdicts[0]


@pytest.mark.skipif(BACKEND == "torch", reason="torch traces nothing")
@each_op
def test_repeated_calls_trace_once(op, monkeypatch):
    traces, module = [], {"mlstm": mlstm_chunks, "slstm": slstm_loop}[op]

    def counted(name, function):
        def count(*args, **kwargs):
            traces.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, count)

    counted("forward", module.forward)
    counted("backward", module.backward)

    def total(tensors):
        return ops.sum(outputs(op, tensors, [None, None])[0])

    inputs, state = OPS[op].inputs(replace(CASE, S=11))  # a length that is traced nowhere else
    for number in range(3):
        tensors = [conformance.as_tensor(x + number, "float32") for x in inputs.values()]
        tensors += [conformance.as_tensor(x, "float32") for x in state.values()]
        if BACKEND == "jax":
            jax.grad(total)(tensors)
        else:
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                y = total(tensors)
            tape.gradient(y, tensors)
        if number == 0:
            first = list(traces)
    assert {*first} == {"forward", "backward"} and traces == first
