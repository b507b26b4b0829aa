"""Prints what the Pallas mLSTM does on eight devices, for `test_pallas.py`: simulated, on the CPU.

XLA_FLAGS=--xla_force_host_platform_device_count=8 KERAS_XLSTM_PALLAS=interpret-gpu python THIS
"""

import re

import jax
import jax.numpy as jnp
import keras
import numpy as np
from conformance import Case, as_tensor, call, mlstm_inputs
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from keras_xlstm_pallas.partition import by_batch_and_head

from keras_xlstm.ops import mlstm

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
CASE = Case(S=20, B=4, NH=2, DHQK=8, DHHV=8)
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
OF_STEPS = NamedSharding(MESH, P("data", None, "model"))  # of q, k, v, i, f
OF_STATE = NamedSharding(MESH, P("data", "model"))


def outputs(tensors):
    h, state = call("mlstm", mlstm, tensors, {}, kernel="pallas", chunk_size=16, return_state=True)
    return h, *state


def gradients(tensors, slopes):
    return jax.vjp(outputs, tensors)[1](slopes)[0]


def row_and_head(q, R, C):
    """Any function that a device can compute of what it has, with weights of heads."""
    return jnp.einsum("bshd,hde,bhef->bshf", q, R, C), jnp.sum(C, -1)


def check(name, function, placed, expected):
    compiled = jax.jit(function).lower(*placed).compile()
    for x, y in zip(compiled(*placed), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        assert x.sharding.shard_shape(x.shape)[0] == x.shape[0] // 4, "whole on each device"
    print(f"{name}: {sorted(set(re.findall(COLLECTIVES, compiled.as_text())))}")


inputs, state = mlstm_inputs(CASE)
tensors = [as_tensor(x, "float32") for x in (*inputs.values(), *state.values())]
expected = outputs(tensors)
slopes = tuple(x + 1 for x in expected)
placed = [jax.device_put(x, OF_STEPS if n < 5 else OF_STATE) for n, x in enumerate(tensors)]
placed_slopes = jax.device_put(slopes, (OF_STEPS, *[OF_STATE] * 3))
check("outputs", outputs, (placed,), expected)
check("gradients", gradients, (placed, placed_slopes), gradients(tensors, slopes))

# As on a TPU, along the mesh that Keras distributes a model over.
arrays = [np.random.default_rng(0).normal(size=x) for x in ((4, 6, 2, 5), (2, 5, 3), (4, 2, 3, 2))]
arrays = [x.astype("float32") for x in arrays]
placed = [jax.device_put(x, OF_STEPS if n == 0 else None) for n, x in enumerate(arrays)]
axes = ("B S NH D", "NH D E", "B NH E F"), ("B S NH F", "B NH E")
mesh = keras.distribution.DeviceMesh((4, 2), ["data", "model"])
layout = keras.distribution.LayoutMap(mesh)
with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="data").scope():
    cut = by_batch_and_head(row_and_head, *axes, on_tpu=True)
    check("over the mesh of Keras", cut, placed, row_and_head(*arrays))
