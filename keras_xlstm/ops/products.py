"""Products of float32 as such, also on devices on which a backend would multiply it as less.

Left alone, JAX and TensorFlow take tf32 on NVIDIA's GPUs, and bfloat16 on TPUs: about three digits.
On a CPU the programs are the same either way. `jax_default_matmul_precision` holds where it is set.

`exact` is a context for the plain forms, which cannot do more under TensorFlow than to follow its
setting of tf32. `einsum` is for what XLA compiles.
"""

import contextlib

import keras
from keras import ops

if keras.backend.backend() == "jax":
    import jax

    def exact():
        return jax.default_matmul_precision(jax.config.jax_default_matmul_precision or "highest")
else:
    exact = contextlib.nullcontext

if keras.backend.backend() == "tensorflow":
    from tensorflow.compiler.tf2xla.python import xla
    from tensorflow.compiler.xla import xla_data_pb2 as protos

    HIGHEST = protos.PrecisionConfig(operand_precision=[protos.PrecisionConfig.HIGHEST] * 2)

    def einsum(subscripts, x, y):
        """Of two tensors. XLA has precisions; TensorFlow's other products have no word for them."""
        inputs, out = subscripts.split("->")
        of_x, of_y = inputs.split(",")
        both = [axis for axis in of_x if axis in of_y]
        batch = [axis for axis in both if axis in out]
        summed = [axis for axis in both if axis not in out]
        dimensions = protos.DotDimensionNumbers(
            lhs_batch_dimensions=map(of_x.index, batch),
            rhs_batch_dimensions=map(of_y.index, batch),
            lhs_contracting_dimensions=map(of_x.index, summed),
            rhs_contracting_dimensions=map(of_y.index, summed),
        )
        product = xla.dot_general(x, y, dimensions, HIGHEST)
        order = batch + [axis for axis in of_x + of_y if axis not in both]
        return ops.transpose(product, [order.index(axis) for axis in out])
else:

    def einsum(subscripts, x, y):
        """Of two tensors."""
        with exact():
            return ops.einsum(subscripts, x, y)
