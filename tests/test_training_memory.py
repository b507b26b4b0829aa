"""Training in less memory: what is computed again, added up over batches, or kept in 16 bits."""

from contextlib import nullcontext as nothing

import keras
import numpy as np
import pytest
from keras import ops

from keras_xlstm.layers import MLSTM, SLSTM
from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

BACKEND = keras.backend.backend()
STYLES = {
    "large": dict(slstm_at=(1,)),
    "original": dict(slstm_at=(1,), block_style="original"),
}
each_style = pytest.mark.parametrize(
    "style", ["large", pytest.param("original", marks=pytest.mark.long_on_xla)]
)


def new_model(style="large", scope=None, optimizer=None):
    keras.utils.set_random_seed(0)
    with scope or nothing():
        backbone = XLSTMBackbone(32, 2, 16, 2, ffn_round_up_to=8, **STYLES[style])
        lm = XLSTMCausalLM(backbone)
    lm.compile(optimizer=optimizer or keras.optimizers.Adam(1e-2), weighted_metrics=[])
    return lm


def data(rows=8, steps=12):
    """Padded on the right."""
    ids = np.random.default_rng(0).integers(0, 8, (rows, steps + 1))
    mask = np.ones((rows, steps), bool)
    mask[::2, -3:] = False
    return {"token_ids": ids[:, :-1], "padding_mask": mask}, ids[:, 1:], mask.astype("float32")


def fit(lm, batch_size, epochs=2):
    x, y, weights = data()
    options = dict(batch_size=batch_size, epochs=epochs, verbose=0, shuffle=False)
    return lm.fit(x, y, sample_weight=weights, **options).history["loss"]


def weights_of(lm):
    return [ops.convert_to_numpy(w) for w in lm.trainable_variables]


@each_style
def test_training_goes_as_without(style):
    plain, again = new_model(style), new_model(style, keras.RematScope("full"))
    losses = fit(plain, 4)
    np.testing.assert_allclose(fit(again, 4), losses, rtol=1e-5)
    assert losses[1] < losses[0]
    for x, y in zip(weights_of(again), weights_of(plain), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)  # Adam: a fifth of a step


def kept(style, scope):
    """What is kept for the gradient, in bytes; of TensorFlow, products in both directions."""
    lm = new_model(style, scope)
    x, _, _ = data(2, 64)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        @tf.function
        def gradients():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(lm.backbone(x, training=True))
            return tape.gradient(loss, lm.backbone.trainable_weights)

        operations = gradients.get_concrete_function().graph.get_operations()
        return sum("MatMul" in x.type for x in operations)
    if BACKEND == "torch":
        import torch

        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lm.backbone(x, training=True)
        return sum(sizes.values())
    import jax

    others = lm.backbone.non_trainable_variables

    def outputs(weights):
        return lm.backbone.stateless_call(weights, others, x, training=True)[0]

    _, backward = jax.vjp(outputs, [w.value for w in lm.backbone.trainable_variables])
    found = {id(x): x.nbytes for x in jax.tree.leaves(backward)}
    return sum(found.values())


@each_style
def test_blocks_that_are_computed_again_keep_their_inputs_only(style):
    one = keras.RematScope("list_of_layers", layer_names=["block_0"])
    plain, named, again = (kept(style, x) for x in (nothing(), one, keras.RematScope("full")))
    if BACKEND == "tensorflow":  # which does not say what it keeps: the blocks' products come twice
        assert again > named > plain
    else:
        assert again < 0.6 * named < 0.5 * plain


@pytest.mark.parametrize("cls", [MLSTM, SLSTM])
@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"stateful": True}], ids=str)
def test_what_moves_on_is_not_computed_again(cls, options):
    """It would be with another dropout, or from the next state: to wrong gradients."""
    x = np.ones((2, 3, 4), "float32")
    with keras.RematScope("full"):
        plain, layer = cls(4, 2), cls(4, 2, **options)
    assert plain(x).shape == (2, 4)
    with pytest.raises(ValueError, match="`keras.RematScope` needs layers that can be computed"):
        layer(x)


def test_batches_add_up():
    """Rows of as many tokens each: a batch is the mean of its parts."""
    x, y, _ = data()
    x["padding_mask"][:] = True

    def trained(batch_size, **options):
        lm = new_model(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, **options))
        lm.fit(x, y, batch_size, epochs=2, verbose=0, shuffle=False)
        return weights_of(lm)

    start = weights_of(new_model())
    parts, whole = trained(2, gradient_accumulation_steps=4), trained(8)
    for a, b in zip(parts, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert max(np.abs(b - c).max() for b, c in zip(whole, start, strict=True)) > 1e-2


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_losses_are_scaled_in_float16(policy):
    """A step whose gradients overflow does not happen, and halves the scale."""
    keras.config.set_dtype_policy(policy)
    try:
        lm = new_model(optimizer=keras.optimizers.Adam(1e-2))
    finally:
        keras.config.set_dtype_policy("float32")
    assert {w.dtype for w in lm.trainable_variables} == {"float32"}
    is_scaled = isinstance(lm.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_scaled == (policy == "mixed_float16")
    if is_scaled:
        lm.optimizer.build(lm.trainable_variables)
        lm.optimizer.dynamic_scale.assign(2.0**60)
        before = weights_of(lm)
        fit(lm, 8, epochs=1)
        assert float(ops.convert_to_numpy(lm.optimizer.dynamic_scale)) == 2.0**59
        for x, y in zip(weights_of(lm), before, strict=True):
            np.testing.assert_array_equal(x, y)
        lm.optimizer.dynamic_scale.assign(2.0**8)
    losses = fit(lm, 4, epochs=4)
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(x).all() for x in weights_of(lm))
