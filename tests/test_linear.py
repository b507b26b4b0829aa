"""Products, soft cap and loss: every kernel beside NumPy float64, values and gradients."""

import keras
import numpy as np
import pytest
from conformance import Truth, outputs_and_gradients
from keras import ops

from keras_xlstm import kernels
from keras_xlstm.layers.dense import Dense, TokenEmbedding
from keras_xlstm.models.token_loss import TokenLoss
from keras_xlstm.ops import mlstm, soft_cap
from keras_xlstm.ops.linear import cross_entropy, linear
from keras_xlstm.ops.normalize import rms_normalize

TARGETS = np.random.default_rng(4).integers(0, 300, (3, 50))


def exact_cross_entropy(logits):
    picked = np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    return np.log(np.sum(np.exp(logits), -1)) - picked


OPS = {  # ours, the reference, shapes of inputs
    "linear": (linear, np.matmul, [(3, 50, 128), (128, 100)]),  # as large as a kernel may want it
    "soft_cap": (lambda x: soft_cap(x, 1.5), lambda x: 1.5 * np.tanh(x / 1.5), [(3, 5, 7)]),
    "rms_normalize": (
        lambda x, scale: rms_normalize(x, scale, 0.1),
        lambda x, scale: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1) * scale,
        [(3, 50, 7), (7,)],
    ),
    "cross_entropy": (
        lambda logits: cross_entropy(logits, ops.convert_to_tensor(TARGETS)),
        exact_cross_entropy,
        [(3, 50, 300)],
    ),
}


@pytest.fixture
def not_intel(monkeypatch):
    if keras.backend.backend() == "torch":
        from keras_xlstm_triton import eager_linear, products

        for module in (eager_linear, products):
            monkeypatch.setattr(module, "mkl_is_best", lambda: False)


@pytest.mark.parametrize(
    "op, kernel", [(op, kernel) for op in OPS for kernel in kernels.available(op)]
)
def test_values_and_gradients(op, kernel, not_intel):
    ours, reference, shapes = OPS[op]
    rng = np.random.default_rng(3)
    inputs = {f"input {j}": rng.normal(size=shape) for j, shape in enumerate(shapes)}
    expected = Truth(lambda *x: [reference(*x)], inputs, {}, "float32")
    run = outputs_and_gradients(lambda tensors, flags: [ours(*tensors)], jit=False)
    with kernels.use(kernel, op=op):  # forced: it must serve the call
        outputs, gradients = run(list(expected.tensors.values()), expected.weights, {})
    expected.check_outputs(outputs)
    expected.check_gradients(gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", kernels.available("cross_entropy"))
def test_cross_entropy_of_large_logits(kernel, dtype):
    logits = ops.cast(1000 * keras.random.normal((3, 50, 300), seed=0), dtype)
    loss = cross_entropy(logits, ops.convert_to_tensor(TARGETS), kernel=kernel)
    expected = ops.convert_to_numpy(ops.cast(logits, "float32")).astype("float64")
    largest = expected.max(-1)
    expected = exact_cross_entropy(expected - largest[..., None])
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.cast(loss, "float32")),
        expected,
        rtol=tolerance,
        atol=largest.max() * 1e-6,
    )


@pytest.mark.parametrize("shape", [(128,), (50, 128), (3, 50, 128), (2, 3, 5, 128)])
def test_products_of_any_number_of_axes(shape):
    x, weights = (np.random.default_rng(0).normal(size=s) for s in (shape, (128, 64)))
    y = linear(*(ops.convert_to_tensor(z, "float32") for z in (x, weights)))
    np.testing.assert_allclose(ops.convert_to_numpy(y), x @ weights, rtol=1e-4, atol=1e-4)


def test_dense_is_that_of_keras():
    x = keras.random.normal((40, 3, 64))
    ours, theirs = Dense(512, activation="relu"), keras.layers.Dense(512, activation="relu")
    ours.build(x.shape)
    theirs.build(x.shape)
    ours.bias.assign(keras.random.normal((512,)))
    theirs.set_weights(ours.get_weights())
    np.testing.assert_allclose(
        ops.convert_to_numpy(ours(x)), ops.convert_to_numpy(theirs(x)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_token_embedding_is_that_of_keras(tied, soft_cap):
    x = keras.random.normal((40, 3, 64))
    options = dict(tie_weights=tied, logit_soft_cap=soft_cap)
    ours, theirs = (
        cls(512, 64, **options) for cls in (TokenEmbedding, keras.layers.ReversibleEmbedding)
    )
    ours.build(())
    theirs.build(())
    theirs.set_weights(ours.get_weights())
    for y, args in ((x, dict(reverse=True)), (ops.arange(9), {})):
        np.testing.assert_allclose(
            ops.convert_to_numpy(ours(y, **args)),
            ops.convert_to_numpy(theirs(y, **args)),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("cls", [Dense, TokenEmbedding])
def test_subclasses_are_quantized_but_not_theirs(cls):
    class Other(cls):
        pass

    sizes = (8,) if cls is Dense else (8, 16)
    for kind in (cls, Other):
        layer = kind(*sizes)
        layer.build((None, 16))
        if kind is cls:
            layer.quantize("int8")
            assert layer.quantization_mode == "int8"
        else:
            with pytest.raises(NotImplementedError):
                layer.quantize("int8")


def test_token_loss_is_that_of_keras():
    logits = keras.random.normal((3, 50, 300))
    weights = np.random.default_rng(0).uniform(size=TARGETS.shape).astype("float32")
    ours, theirs = TokenLoss(), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for sample_weight in (None, weights):
        np.testing.assert_allclose(
            float(ours(TARGETS, logits, sample_weight)),
            float(theirs(TARGETS, logits, sample_weight)),
            rtol=1e-6,
        )
    again = keras.losses.deserialize(keras.losses.serialize(ours))
    assert isinstance(again, TokenLoss)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's kernels")
def test_the_first_product_may_come_while_torch_traces(not_intel):
    from keras_xlstm_triton import products
    from torch.fx.experimental.proxy_tensor import make_fx

    products.is_exact.cache_clear()
    q, gate = ops.ones((1, 3, 1, 4)), ops.zeros((1, 3, 1))
    traced = make_fx(lambda *x: mlstm(*x, kernel="torch"), tracing_mode="fake")(q, q, q, gate, gate)
    assert traced(q, q, q, gate, gate).shape == q.shape


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's kernels")
def test_products_are_mkl_s_on_intel(monkeypatch):
    from keras_xlstm_triton import eager_linear

    x = ops.ones((64, 128)), ops.ones((128, 256))
    for is_intel, expected in ((True, "keras"), (False, "onednn")):
        monkeypatch.setattr(eager_linear, "mkl_is_best", lambda is_intel=is_intel: is_intel)
        assert kernels.choose("linear", "auto", x, {}).name == expected


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's kernels")
def test_second_derivatives_of_the_norm():
    import torch
    from keras_xlstm_triton.eager_linear import RMSNormalize

    x = torch.randn(5, 7, dtype=torch.float64)
    x[2] = 0
    inputs = x.requires_grad_(), torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *x: RMSNormalize.apply(*x, 0.1), inputs)
    y, dy = RMSNormalize.apply(*inputs, 0.1), torch.randn(5, 7, dtype=torch.float64)
    once = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(y, inputs, dy, create_graph=True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's kernels")
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_the_norm_under_vmap(axes):
    import torch
    from keras_xlstm_triton.eager_linear import RMSNormalize

    def gradients(*inputs):
        return torch.func.grad(lambda *x: RMSNormalize.apply(*x, 0.1).sin().sum(), (0, 1))(*inputs)

    stacked = torch.randn(3, 5, 7), torch.randn(3, 7)
    inputs = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]
    got = torch.vmap(gradients, axes)(*inputs)
    for j in range(3):
        each = [x[j] if axis == 0 else x for x, axis in zip(inputs, axes, strict=True)]
        for a, b in zip(got, gradients(*each), strict=True):
            torch.testing.assert_close(a[j], b)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="of torch's kernels")
def test_the_norm_s_own_gradient_serves_where_one_is_taken():
    import torch

    x = torch.ones(2, 3, 4), torch.ones(4, requires_grad=True), 0.1
    assert kernels.choose("rms_normalize", "auto", x, {}).name == "torch"
    with torch.no_grad():
        assert kernels.choose("rms_normalize", "auto", x, {}).name == "keras"


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's kernels")
def test_second_derivatives_of_the_loss():
    import jax
    from jax.test_util import check_grads
    from keras_xlstm_pallas.xla import cross_entropy

    logits = jax.random.normal(jax.random.key(0), (5, 7))
    targets = jax.numpy.arange(5)
    check_grads(lambda x: cross_entropy(x, targets), [logits], order=2, modes=["rev"], rtol=2e-2)
