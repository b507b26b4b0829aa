"""Prints what the Pallas sLSTM does on eight devices, for its tests: simulated, on the CPU.

XLA_FLAGS=--xla_force_host_platform_device_count=8 KERAS_XLSTM_PALLAS=interpret-gpu python THIS
"""

import re

import jax
import numpy as np
from conformance import Case, as_tensor, call, slstm_inputs
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from keras_xlstm.ops import slstm

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
CASE = Case(S=3, B=4, NH=2, DHHV=3, mask="holes", reset="some")
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
PLACES = [P("data", None, None, "model"), P("model"), P(None, "model"), *[P("data", "model")] * 4]


def outputs(tensors):
    options = {"kernel": "pallas", "return_state": True}
    h, state = call("slstm", slstm, tensors, CASE.flags(), **options)
    return h, *state


def gradients(tensors, slopes):
    return jax.vjp(outputs, tensors)[1](slopes)[0]


def check(name, function, places, placed, expected):
    compiled = jax.jit(function).lower(*placed).compile()
    for x, y, place in zip(compiled(*placed), expected, places, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
        assert x.sharding.is_equivalent_to(NamedSharding(MESH, place), x.ndim), x.sharding
    print(f"{name}: {sorted(set(re.findall(COLLECTIVES, compiled.as_text())))}")


inputs, state = slstm_inputs(CASE)
tensors = [as_tensor(x, "float32") for x in (*inputs.values(), *state.values())]
expected = outputs(tensors)
slopes = tuple(x + 1 for x in expected)
of_results = P("data", None, "model"), *PLACES[3:]


def place(arrays, places):
    pairs = zip(arrays, places, strict=True)
    return [jax.device_put(x, NamedSharding(MESH, place)) for x, place in pairs]


placed, placed_slopes = place(tensors, PLACES), tuple(place(slopes, of_results))
check("outputs", outputs, of_results, (placed,), expected)
check("gradients", gradients, PLACES, (placed, placed_slopes), gradients(tensors, slopes))
