"""The Triton kernels in the real compilers, without a GPU.

python examples/benchmarks/kernels.py --compile                  a table, for all targets
python examples/benchmarks/kernels.py --compile sm_90 --widths 256x512 --dtypes bfloat16

Every variant of the mLSTM's walk (`backends/keras_xlstm_triton/mlstm_walk.py`) that a call may
choose is compiled ahead of time. The table says what a program needs of a chip: registers of a
thread, bytes of a thread that did not fit them (spills), shared memory of a program; and how many
instructions for tensor cores it has. The exit status is 1 where one needs more than the chip has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program
WIDTHS = "64x64", "128x128", "128x256", "256x512"  # DHQK x DHHV
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Of the walks that `mlstm_walk.py` lists, and of their first pass over segments, which has no out.
WALKS = ("h", True), ("dq", True), ("dk", True), ("dv", True), ("dq", False), ("dk", False)
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"
COLUMNS = "target", "dtype", "widths", "walk", "registers", "spills", "shared", "tensor cores"


def compiled(target, dtype, widths, walk, out):
    """A row of the table."""
    import torch
    import triton
    from keras_xlstm_triton.mlstm import operands
    from keras_xlstm_triton.mlstm_plan import Device, longest, tiles_of
    from keras_xlstm_triton.mlstm_walk import walk as kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    torch_dtype, (DHQK, DHHV) = getattr(torch, dtype), map(int, widths.split("x"))
    # As `Device.of` says of it.
    device = Device(reads_shared_memory=target in ("sm_90", "sm_100"))
    L = longest(torch_dtype, device)
    by_value, by_key = tiles_of(torch_dtype, L, DHQK, DHHV, device)
    tiles, full, part = (by_key, DHHV, DHQK) if walk in ("dq", "dk") else (by_value, DHQK, DHHV)
    dot, precision = operands(torch_dtype)
    constants = {
        "FULL_WIDTH": full, "TILE_WIDTH": part, "SLICE": tiles.slice, "TILE": tiles.tile,
        "ON_CHIP": tiles.on_chip,
        "L": L, "WALK": walk, "OUT": out, "DOT": dot, "PRECISION": precision,
    }  # fmt: skip

    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in ("a", "b", "c", "d", "out"):
            return f"*{DTYPES[dtype]}"
        if name == "C_kept":
            return "*bf16" if dtype == "bfloat16" else "*fp32"
        if name == "eps":
            return "fp32"
        is_number = name in ("S", "NH", "segments", "chunks", "chunks_each")
        return "i32" if is_number or re.fullmatch("[abcd]_(batch|step|head)", name) else "*fp32"

    types = {name: type_of(name) for name in kernel.arg_names}
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(types.items())
        if kind[0] == "*" or re.fullmatch("[abcd]_(batch|step|head)", name)
    }
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": tiles.warps, "num_stages": 1}
    source = ASTSource(kernel, types, constants, aligned)
    result = triton.compile(source, target=gpu, options=options)
    registers, spills = resources_of(result, amd)
    text = result.asm["amdgcn" if amd else "ptx"]
    name = walk if out else f"{walk}, first pass"
    found = len(re.findall(TENSOR_CORES, text))
    return target, dtype, widths, name, registers, spills, result.metadata.shared, found


def resources_of(result, amd):
    """Registers, and bytes of a thread's own memory."""
    if amd:
        text = result.asm["amdgcn"]
        found = [re.search(rf"\.{key}: +(\d+)", text) for key in AMD_KEYS]
        return tuple(int(x[1]) for x in found)
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "walk.cubin")
        path.write_bytes(result.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))


AMD_KEYS = "vgpr_count", "private_segment_fixed_size"


def problems(row):
    """What a chip cannot do, or not well. What is known stands in `backends/README.md`."""
    target, dtype, _, _, _, spills, shared, tensor_cores = row
    if shared > SHARED[target] * 1024:
        yield f"needs {shared} bytes of shared memory"
    if spills and dtype == "bfloat16" and target in ("sm_90", "sm_100"):
        yield f"spills {spills} bytes"
    if dtype != "float32" and not tensor_cores:
        yield "has no instruction for tensor cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", nargs="*", choices=SHARED, required=True, metavar="TARGET")
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="DHQKxDHHV")
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--walks", nargs="+", choices=sorted({name for name, _ in WALKS}))
    options = parser.parse_args()
    walks = [walk for walk in WALKS if walk[0] in (options.walks or walk)]
    cases = product(options.compile or SHARED, options.dtypes, options.widths, walks)
    columns = zip(*((*case, *walk) for *case, walk in cases), strict=True)
    broken = 0
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    with ProcessPoolExecutor(2) as pool:
        for row in pool.map(compiled, *columns):
            found = ", ".join(problems(row))
            broken += bool(found)
            print("|", " | ".join(map(str, row)), "|", f" <- {found}" if found else "", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
