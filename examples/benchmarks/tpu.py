"""The Pallas kernels in the real TPU compiler, without a TPU.

python examples/benchmarks/tpu.py                        a table, for all chips
python examples/benchmarks/tpu.py v5e --widths 256x512 --dtypes bfloat16

The mLSTM, and its gradient, is compiled ahead of time for one core of each chip, (B, S, NH) =
(4, 4096, 4), and once for four chips that share out batch and heads. The table says how many
kernels the program has, how many products of matrices are in them, the VMEM of the largest of them
in KiB, the program's own memory in MiB, beside inputs and outputs, and which collectives it has.
The exit status is 1 where the compiler refuses, or a program is not what it should be. It needs
libtpu (`pip install libtpu`).
"""

import argparse
import base64
import os
import re
import sys
from itertools import product

# Of the compiler: it is not to look for a TPU, and may be in several processes.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax", "KERAS_XLSTM_PALLAS": "tpu"}

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTHS = "64x64", "128x128", "128x256", "256x512", "20x36", "1024x1024"  # DHQK x DHHV
DTYPES = "bfloat16", "float32"
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLUMNS = "chip", "dtype", "widths", "of", "kernels", "products", "VMEM", "memory", "collectives"
KERNELS = {"h": 1, "gradients": 3}  # the latter: h too, memories at the starts of chunks, gradients


def compiled_for_tpu(chip, dtype, widths, of, chips=1):
    """A row of the table."""
    import jax
    import keras
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from keras_xlstm.ops import mlstm

    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    shape = (2, 2) if chips > 1 else (1, 1)
    mesh = Mesh(np.array(devices[:chips]).reshape(shape), ("data", "model"))
    B, S, NH, (DHQK, DHHV) = 4, 4096, 4, map(int, widths.split("x"))

    def array(*shape, dtype="float32", axes=("data", "model")):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes))
        )

    def sequence(*width, dtype=dtype):
        return array(B, S, NH, *width, dtype=dtype, axes=("data", None, "model"))

    q, v, gate = sequence(DHQK), sequence(DHHV), sequence(dtype="float32")
    state = array(B, NH, DHQK, DHHV), array(B, NH, DHQK), array(B, NH)

    def h(q, k, v, i, f, *state):
        h, state = mlstm(q, k, v, i, f, initial_state=state, return_state=True)
        return h, *state

    def gradients(slopes, *inputs):
        return jax.vjp(h, *inputs)[1](slopes)

    function, slopes = {"h": (h, ()), "gradients": (gradients, ((v, *state),))}[of]
    axes = keras.distribution.DeviceMesh(
        shape, ["data", "model"], [f"tpu:{n}" for n in range(chips)]
    )
    layout = keras.distribution.LayoutMap(axes)
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="data").scope():
        lowered = jax.jit(function).lower(*slopes, q, q, v, gate, gate, *state)
    program = lowered.compile()
    text = program.as_text()
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = [re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', x) for x in kernels]
    found = sorted(set(re.findall(COLLECTIVES, text)))
    name = of if chips == 1 else f"{of}, {chips} chips"
    return (
        *(chip, dtype, widths, name, len(kernels), sum(map(products, kernels))),
        max(int(x[1]) for x in sizes) // 1024 if sizes else 0,
        program.memory_analysis().temp_size_in_bytes // 2**20,
        ", ".join(found) or "none",
    )


def products(kernel):
    """The products of matrices in the text of a kernel."""
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    body = base64.b64decode(re.search(r'"body":"([^"]*)"', kernel)[1])
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        return len(re.findall(r"tpu\.matmul|vector\.contract", str(ir.Module.parse(body))))


def problems(row):
    *_, of, kernels, found, _, _, collectives = row
    if kernels != KERNELS[of.split(",")[0]]:
        yield "not the kernels"
    if not found:
        yield "no product for the MXU"
    if collectives != "none":
        yield "collectives"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chips", nargs="*", default=[*CHIPS], metavar="CHIP", help=", ".join(CHIPS))
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="DHQKxDHHV")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    options = parser.parse_args()
    cases = [(*x, 1) for x in product(options.chips, options.dtypes, options.widths, KERNELS)]
    cases += [(options.chips[0], options.dtypes[0], "128x128", of, 4) for of in KERNELS]
    broken = 0
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    for case in cases:
        row = compiled_for_tpu(*case)
        found = ", ".join(problems(row))
        broken += bool(found)
        print("|", " | ".join(map(str, row)), "|", f" <- {found}" if found else "", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
