"""What XLA is told of the kernels' products, for devices that are not here.

Without a word, GPUs multiply float32 as tf32 and TPUs as bfloat16.
"""

import re

import keras
import numpy as np
import pytest

from keras_xlstm import ops

BACKEND = keras.backend.backend()
if BACKEND == "torch":
    pytest.skip("PyTorch multiplies float32 as such, unless it is told", allow_module_level=True)

NAMES = {"mlstm": ["step", "xla", "chunkwise", "parallel", "recurrent"], "slstm": ["xla", "scan"]}
EACH = [(op, name) for op, names in NAMES.items() for name in names]


def inputs(op, S, dtype="float32"):
    B, NH, DHQK, DHHV = 2, 3, 4, 5
    rng = np.random.default_rng(0)
    shapes = {
        "mlstm": [(B, S, NH, DHQK)] * 2 + [(B, S, NH, DHHV)] + [(B, S, NH)] * 2,
        "slstm": [(B, S, 4, NH, DHHV), (NH, DHHV, 4, DHHV), (4, NH, DHHV)],
    }
    return [keras.ops.convert_to_tensor(rng.normal(size=x), dtype) for x in shapes[op]]


def loss(op, kernel):
    def run(*args):
        h, state = getattr(ops, op)(*args, kernel=kernel, return_state=True)
        return sum(keras.ops.sum(x * x) for x in (h, *state))

    return run


def gradient_for(platform, op, kernel):
    """The text of the program that computes the gradient of every input."""
    import jax

    x = inputs(op, S=1 if kernel == "step" else 100)
    function = jax.jit(jax.grad(loss(op, kernel), argnums=range(len(x))))
    return function.trace(*x).lower(lowering_platforms=(platform,)).as_text()


on_jax = pytest.mark.skipif(BACKEND != "jax", reason="lowered by JAX")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="compiled by TensorFlow")


@on_jax
@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("op, kernel", EACH)
def test_jax_multiplies_float32_as_such(op, kernel, platform):
    text = gradient_for(platform, op, kernel)
    assert set(re.findall(r"precision = \[(.*?)\]", text)) == {"HIGHEST, HIGHEST"}
    assert text.count("dot_general") == text.count("precision = [")
    assert "custom_call" not in text  # such as callbacks, which have no place on a device


@on_jax
def test_jax_multiplies_as_a_user_says():
    import jax

    with jax.default_matmul_precision("tensorfloat32"):
        text = gradient_for("cuda", "mlstm", "xla")
    assert set(re.findall(r"precision = \[(.*?)\]", text)) == {"HIGH, HIGH"}


@on_tensorflow
@pytest.mark.parametrize("op", NAMES)
def test_tensorflow_multiplies_float32_as_such(op):
    """Of TensorFlow's program for XLA, which the device does not change."""
    import tensorflow as tf

    assert tf.config.experimental.tensor_float_32_execution_enabled()  # as TensorFlow comes
    x = inputs(op, S=100)

    @tf.function(jit_compile=True, autograph=False)
    def gradient(*x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = loss(op, "xla")(*x)
        return tape.gradient(y, x)

    text = gradient.experimental_get_compiler_ir(*x)(stage="hlo")
    dots = re.findall(r" dot\(.*", text)
    assert dots and all("operand_precision={highest,highest}" in dot for dot in dots)
    assert "custom-call" not in text  # such as callbacks, which have no place on a device
    assert "<=" not in text  # sizes that are known only while it runs
