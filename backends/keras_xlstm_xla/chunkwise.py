"""The chunkwise mLSTM for TensorFlow, compiled by XLA also where the caller is not.

The mathematics is the chunkwise form of `keras_xlstm/ops/mlstm.py`, which XLA fuses. Each new
shape is compiled once; a batch or length that is unknown when it is traced is known to XLA by
the time it compiles.
"""

import tensorflow as tf

from keras_xlstm.ops.mlstm import chunkwise


@tf.function(jit_compile=True, autograph=False)
def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    return chunkwise(q, k, v, i, log_f, s, state, chunk_size=chunk_size, eps=eps)
