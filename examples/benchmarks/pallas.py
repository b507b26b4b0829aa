"""The Pallas kernels in the real compilers, without a TPU and without a GPU.

python examples/benchmarks/pallas.py --compile                     a table, for all chips
python examples/benchmarks/pallas.py --compile v5e sm_90 --widths 256x512 64 --dtypes bfloat16

The mLSTM and the sLSTM, and the gradients of both, are compiled ahead of time for each chip, and
for four TPUs that share out batch and heads. The table says how many kernels a program has. Of a
TPU: the VMEM of the largest of them in KiB, and MiB of memory beside inputs and outputs. Of a GPU:
for each kernel the registers of a thread, bytes of a thread that did not fit them (spills), and KiB
of shared memory of a program. Where a kernel does not serve it says why; `xla` does.

The exit status is 1 where a compiler refuses, or a program has not the kernels that it should have;
on TPUs where these have no product for the MXU, or the program collectives; on GPUs where a kernel
needs more shared memory than there is, or spills on sm_90 or sm_100.

For TPUs it needs libtpu, and for GPUs Triton, with what XLA hands to the Triton that it contains.
"""

import argparse
import base64
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

# Of libtpu: it is not to look for a TPU, and may be in several processes.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import kernels as of_triton
from measure import positive

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GPUS = "sm_80", "sm_90", "sm_100"
# DHQK x DHHV of the mLSTM, DH of the sLSTM.
WIDTHS = "20x36", "64x64", "128x128", "128x256", "256x512", "512x512", "1024x1024"
WIDTHS += "20", "64", "128", "256"
DTYPES = "bfloat16", "float16", "float32"
# On a TPU and on a GPU; gradients have those of h too.
KERNELS = {("mlstm", "h"): (1, 2), ("mlstm", "gradients"): (3, 7)}
KERNELS |= {("slstm", "h"): (1, 1), ("slstm", "gradients"): (2, 2)}
COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLUMNS = "chip", "dtype", "widths", "of", "kernels", "VMEM or registers, spills, shared", "memory"


def compiled(chip, dtype, widths, of, S, chips=1):
    """A row of the table, and what is wrong with it."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    jax.clear_caches()  # of other chips
    os.environ["KERAS_XLSTM_PALLAS"] = "tpu" if chip in TPUS else "gpu"
    op, *width = ("mlstm", *widths.split("x")) if "x" in widths else ("slstm", widths)
    sizes = {"B": 4 if op == "mlstm" else 8, "S": S, "NH": 4, "G": 4}
    sizes |= zip(("DHQK", "DHHV") if op == "mlstm" else ("DH",), map(int, width), strict=True)
    shared_out = {"B": "data", "NH": "model"}
    mesh = tpus(chip, chips) if chip in TPUS else None

    def array(axes, dtype="float32"):
        axes, sharding = axes.split(), None
        if mesh:
            sharding = NamedSharding(mesh, PartitionSpec(*map(shared_out.get, axes)))
        return jax.ShapeDtypeStruct([sizes[x] for x in axes], dtype, sharding=sharding)

    verdicts = []
    h, flags, inputs, slopes = {"mlstm": mlstm, "slstm": slstm}[op](array, dtype, verdicts)

    def gradients(flags, slopes, *inputs):
        return jax.vjp(lambda *inputs: h(flags, *inputs), *inputs)[1](slopes)

    function = jax.jit({"h": h, "gradients": gradients}[of])
    arguments = (flags, *inputs) if of == "h" else (flags, slopes, *inputs)
    found, needs, memory, wrong = (on_tpus if mesh else on_gpu)(function, arguments, mesh or chip)
    name = of if chips == 1 else f"{of}, {chips} chips"
    if objection := re.search(r"^- pallas: (.*)", verdicts[0], re.MULTILINE):
        return (chip, dtype, widths, name, found, objection[1], ""), []
    if found != (right := KERNELS[op, of][chip in GPUS]):
        wrong = [f"should have {right} kernels", *wrong]
    return (chip, dtype, widths, name, found, needs, memory), wrong


def mlstm(array, dtype, verdicts):
    """A function of no flags and inputs, these, and what its results look like."""
    from keras_xlstm import kernels
    from keras_xlstm.ops import mlstm

    q, v, gate = array("B S NH DHQK", dtype), array("B S NH DHHV", dtype), array("B S NH")
    state = array("B NH DHQK DHHV"), array("B NH DHQK"), array("B NH")

    def h(flags, q, k, v, i, f, *state):
        options = {"initial_state": state, "return_state": True}
        verdicts.append(kernels.explain(q, k, v, i, f, **options))
        h, state = mlstm(q, k, v, i, f, **options)
        return h, *state

    return h, (), (q, q, v, gate, gate, *state), (v, *state)


def slstm(array, dtype, verdicts):
    """As `mlstm`, of flags, and with recurrent dropout."""
    from keras_xlstm import kernels
    from keras_xlstm.ops import slstm

    gates, flags = array("B S G NH DH", dtype), (array("B S", "bool"),) * 2
    state = [array("B NH DH")] * 4
    inputs = gates, array("NH DH G DH"), array("G NH DH"), array("B NH DH"), *state

    def h(flags, gates, R, bias, scale, *state):
        verdicts.append(kernels.explain(gates, R, bias, op="slstm"))
        options = dict(zip(("mask", "reset"), flags, strict=True), recurrent_scale=scale)
        h, state = slstm(gates, R, bias, initial_state=state, return_state=True, **options)
        return h, *state

    return h, flags, inputs, (array("B S NH DH", dtype), *state)


def tpus(chip, number):
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip]).devices
    return Mesh(np.array(devices[:number]).reshape((2, 2) if number == 4 else (1, 1)), MESH_AXES)


MESH_AXES = "data", "model"


def on_tpus(function, arguments, mesh):
    """Kernels, what they need, the memory of the program, and what is wrong with it."""
    import keras

    names = [f"tpu:{n}" for n in range(mesh.size)]
    keras_mesh = keras.distribution.DeviceMesh(mesh.devices.shape, MESH_AXES, names)
    layout = keras.distribution.LayoutMap(keras_mesh)
    with keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="data").scope():
        lowered = function.lower(*arguments)
    program = lowered.compile()
    text = program.as_text()
    kernels = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    sizes = [re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', x) for x in kernels]
    largest = max(int(x[1]) for x in sizes) // 1024 if kernels else ""
    wrong = [] if all(map(has_products, kernels)) else ["a kernel has no product for the MXU"]
    wrong += sorted(set(re.findall(COLLECTIVES, text)))
    return len(kernels), largest, program.memory_analysis().temp_size_in_bytes // 2**20, wrong


def has_products(kernel):
    """Whether there are products of matrices in the text of a kernel for TPUs."""
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    body = base64.b64decode(re.search(r'"body":"([^"]*)"', kernel)[1])
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        return re.search(r"tpu\.matmul|vector\.contract", str(ir.Module.parse(body))) is not None


def on_gpu(function, arguments, chip):
    """As `on_tpus`. The memory of a program is XLA's, which compiles for GPUs only on one."""
    lowered = function.trace(*arguments).lower(lowering_platforms=("cuda",))
    needs = [needs_of(*kernel, chip) for kernel in for_triton(lowered.compiler_ir("stablehlo"))]
    wrong = []
    for _, spills, shared in needs:
        if spills and chip in ("sm_90", "sm_100"):
            wrong.append(f"spills {spills} bytes")
        if shared > of_triton.SHARED[chip]:
            wrong.append(f"needs {shared} KiB of shared memory")
    return len(needs), "; ".join(", ".join(map(str, x)) for x in needs), "", wrong


def for_triton(module):
    """The kernels that a program hands to Triton: in Triton's language, and options of each."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.triton import dialect

    def operations(operation):
        for region in operation.regions:
            for block in region:
                for inner in block:
                    yield inner.operation
                    yield from operations(inner.operation)

    with module.context as context:
        dialect.register_dialect(context)
        for operation in operations(module.operation):
            target = operation.attributes.get("call_target_name")
            if target is not None and ir.StringAttr(target).value == "__gpu$xla.gpu.triton":
                config = operation.attributes["mhlo.backend_config"]
                code = str(ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes))
                options = "num_warps", "num_stages"
                yield code, {x: ir.IntegerAttr(config[x]).value for x in options}


def needs_of(code, options, chip):
    """Registers and spills of a thread, and KiB of shared memory, of what Triton makes of it."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(code)
        result = triton.compile(str(path), GPUTarget("cuda", int(chip[3:]), 32), options)
    return *of_triton.resources_of(result, amd=False), -(-result.metadata.shared // 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chips = *TPUS, *GPUS
    parser.add_argument("--compile", nargs="*", choices=chips, required=True, metavar="CHIP")
    parser.add_argument(
        "--widths", nargs="+", type=of_triton.head_widths, default=WIDTHS, metavar="DHQKxDHHV or DH"
    )
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--of", nargs="+", default=["h", "gradients"], choices=["h", "gradients"])
    parser.add_argument("--steps", default=4096, type=positive)
    options = parser.parse_args()
    chips = options.compile or chips
    cases = list(product(chips, options.dtypes, options.widths, options.of, [options.steps], [1]))
    tpu, widths = next((x for x in chips if x in TPUS), None), "128x128"
    if tpu and any("x" in x for x in options.widths):
        cases += [(tpu, options.dtypes[0], widths, of, options.steps, 4) for of in options.of]
    broken = 0
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    with ProcessPoolExecutor(2) as pool:
        for row, wrong in pool.map(compiled, *zip(*cases, strict=True)):
            broken += bool(wrong)
            said = f" <- {', '.join(wrong)}" if wrong else ""
            print("|", " | ".join(map(str, row)), "|", said, flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
