"""Layers and inputs that the tests of layers and blocks share."""

import keras
import numpy as np
from keras import ops
from keras.src.testing import TestCase

from keras_xlstm.layers import MLSTM, SLSTM, MLSTMCell, SLSTMCell

LAYERS = {"slstm": SLSTM, "mlstm": MLSTM}
CELLS = {"slstm": SLSTMCell, "mlstm": MLSTMCell}
SIZES = {  # 2 heads of width 3, and of 2 x 3, on 4 features
    "slstm": dict(units=6, num_heads=2),
    "mlstm": dict(units=6, num_heads=2, key_dim=2, chunk_size=3),
}
B, S, D, UNITS = 2, 7, 4, 6

# Sums in another order change float32 outputs of order 1 in the last digits.
NOISE = dict(rtol=2e-5, atol=2e-5)

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]],
    "holes": [[1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0]],
}
MASKS = {name: np.array(mask, bool) for name, mask in MASKS.items()}

run_layer_test = TestCase("run_layer_test").run_layer_test


def new_layer(kind, **kwargs):
    """A built layer. Those of one kind all have the same weights, whatever else differs."""
    layer = LAYERS[kind](**SIZES[kind] | kwargs)
    layer.build((B, None, D))
    return noisy(layer)


def new_cell(kind, **kwargs):
    """A built cell, with the weights of `new_layer`."""
    cell = CELLS[kind](**SIZES[kind] | kwargs)
    cell.build((B, D))
    return noisy(cell)


def noisy(layer, scale=0.7):
    """Gives every weight random numbers, so that none is without effect."""
    rng = np.random.default_rng(0)
    for w in layer.weights:
        w.assign(scale * rng.normal(size=w.shape))
    return layer


def random(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def flags(*rows):
    return np.array(rows, bool)


def numpy(tree):
    return keras.tree.map_structure(lambda x: ops.convert_to_numpy(ops.cast(x, "float32")), tree)


def gradients(loss, arrays):
    """`loss(*tensors) -> (scalar, outputs)`, run eagerly: the outputs, and its gradients."""
    if keras.backend.backend() == "jax":
        import jax

        order = tuple(range(len(arrays)))
        slopes, outputs = jax.grad(loss, argnums=order, has_aux=True)(*map(ops.array, arrays))
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tensors = [tf.convert_to_tensor(x) for x in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total, outputs = loss(*tensors)
        slopes = tape.gradient(total, tensors, unconnected_gradients="zero")
    else:
        import torch

        tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
        total, outputs = loss(*tensors)
        slopes = torch.autograd.grad(total, tensors, materialize_grads=True)
        outputs = [y.detach() for y in outputs]
    return outputs, list(slopes)


def assert_close(got, wanted, **tolerance):
    """Compares two structures of arrays, element by element."""
    pairs = zip(keras.tree.flatten(got), keras.tree.flatten(wanted), strict=True)
    for x, y in pairs:
        assert tuple(np.shape(x)) == tuple(np.shape(y))
        np.testing.assert_allclose(numpy(x), numpy(y), **NOISE | tolerance)
