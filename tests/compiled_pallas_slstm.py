"""A table of what the compilers make of the Pallas sLSTM, without a TPU or a GPU, for its tests.

python tests/compiled_pallas_slstm.py                     for all chips
python tests/compiled_pallas_slstm.py v6e --widths 256

For one core of a TPU: its kernels, the scoped VMEM of the largest in KiB, and MiB of memory beside
inputs and outputs. For a GPU, how many kernels JAX hands to Triton. The exit status is 1 where a
program has not the kernels that it should have.
"""

import argparse
import os
import re
import sys
from itertools import product

# Of the compiler: it is not to look for a TPU, and may be in several processes.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
os.environ |= {"JAX_PLATFORMS": "cpu", "KERAS_BACKEND": "jax"}
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "gpu": None}
WIDTHS = 64, 128, 256, 20
DTYPES = "bfloat16", "float32"
KERNELS = {"h": 1, "gradients": 2}
COLUMNS = "chip", "dtype", "width", "of", "kernels", "VMEM", "memory"


def compiled(chip, dtype, DH, of, B=8, S=4096, NH=4):
    """A row of the table, or `None` where the kernel does not serve."""
    import jax
    from jax import export
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from keras_xlstm import kernels
    from keras_xlstm.ops import slstm

    os.environ["KERAS_XLSTM_PALLAS"] = "gpu" if chip == "gpu" else "tpu"
    sharding = None
    if chip != "gpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
        sharding = SingleDeviceSharding(topology.devices[0])

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    gates, state = array(B, S, 4, NH, DH, dtype=dtype), [array(B, NH, DH)] * 4
    inputs = gates, array(NH, DH, 4, DH), array(4, NH, DH), array(B, NH, DH), state
    flags = array(B, S, dtype="bool"), array(B, S, dtype="bool")
    verdicts = []

    def h(flags, gates, R, bias, scale, state):
        options = dict(zip(("mask", "reset"), flags, strict=True), recurrent_scale=scale)
        verdicts.append(kernels.explain(gates, R, bias, op="slstm"))
        h, state = slstm(gates, R, bias, initial_state=state, return_state=True, **options)
        return h, *state

    def gradients(flags, slopes, *inputs):
        return jax.vjp(lambda *inputs: h(flags, *inputs), *inputs)[1](slopes)

    slopes = array(B, S, NH, DH, dtype=dtype), *state
    arguments = (flags, *inputs) if of == "h" else (flags, slopes, *inputs)
    function = jax.jit({"h": h, "gradients": gradients}[of])
    if chip == "gpu":
        triton = "__gpu$xla.gpu.triton"
        unchecked = [export.DisabledSafetyCheck.custom_call(triton)]
        exported = export.export(function, platforms=["cuda"], disabled_checks=unchecked)
        text = exported(*arguments).mlir_module()
        count, figures = text.count(f"@{triton}"), ("", "")
    else:
        program = function.lower(*arguments).compile()
        lines = program.as_text().splitlines()
        lines = [line for line in lines if 'custom_call_target="tpu_custom_call"' in line]
        sizes = [re.search(r'"used_scoped_memory_configs":\[.*?"size":"(\d+)"', x) for x in lines]
        memory = program.memory_analysis().temp_size_in_bytes // 2**20
        count, figures = len(lines), (max(int(x[1]) for x in sizes) // 1024 if sizes else 0, memory)
    return (chip, dtype, DH, of, count, *figures) if "* pallas:" in verdicts[0] else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chips", nargs="*", default=[*CHIPS], metavar="CHIP", help=", ".join(CHIPS))
    parser.add_argument("--widths", nargs="+", default=WIDTHS, type=int)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    options = parser.parse_args()
    broken = 0
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    for case in product(options.chips, options.dtypes, options.widths, KERNELS):
        if row := compiled(*case):
            broken += row[4] != KERNELS[row[3]]
            print("|", " | ".join(map(str, row)), "|", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
