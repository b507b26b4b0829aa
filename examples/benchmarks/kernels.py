"""The Triton kernels in the real compilers, without a GPU.

python examples/benchmarks/kernels.py --compile                  a table, for all targets
python examples/benchmarks/kernels.py --compile sm_90 --widths 256x512 64 --dtypes bfloat16

Every variant of the mLSTM's walk and of the sLSTM's loops (`mlstm_walk.py` and `slstm_scan.py` in
`backends/keras_xlstm_triton`) that a call may choose is compiled ahead of time. The table says what
a program needs of a chip: registers of a thread, bytes of a thread that did not fit them (spills),
shared memory of a program; and how many instructions for tensor cores it has. The exit status is 1
where one needs more than the chip has.
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
WIDTHS = "64x64", "128x128", "128x256", "256x512"  # DHQK x DHHV of the mLSTM
WIDTHS += "16", "64", "128", "256"  # DH of the sLSTM
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Of the walks that `mlstm_walk.py` lists, and of their first pass over segments, which has no out.
WALKS = ("h", True), ("dq", True), ("dk", True), ("dv", True), ("dq", False), ("dk", False)
LOOPS = ("forward", False), ("backward", True)  # of `slstm_scan.py`
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"
COLUMNS = "target", "dtype", "widths", "walk", "registers", "spills", "shared", "tensor cores"


def compiled(target, dtype, widths, name, flag):
    """A row of the table."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant = mlstm_variant if "x" in widths else slstm_variant
    name, kernel, types, constants, warps = variant(target, dtype, widths, name, flag)
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, (argument, kind) in enumerate(types.items())
        if kind[0] == "*" or argument == "KIND" or re.fullmatch(STRIDE, argument)
    }
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, types, constants, aligned)
    result = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": 1})
    registers, spills = resources_of(result, amd)
    found = len(re.findall(TENSOR_CORES, result.asm["amdgcn" if amd else "ptx"]))
    return target, dtype, widths, name, registers, spills, result.metadata.shared, found


STRIDE = "([abcd]|gates|dh)_(batch|step|gate|head)"


def mlstm_variant(target, dtype, widths, walk, out):
    import torch
    from keras_xlstm_triton.mlstm import operands
    from keras_xlstm_triton.mlstm_plan import Device, longest, tiles_of
    from keras_xlstm_triton.mlstm_walk import walk as kernel

    torch_dtype, (DHQK, DHHV) = getattr(torch, dtype), map(int, widths.split("x"))
    # As `Device.of` says of it.
    device = Device(reads_shared_memory=target in ("sm_90", "sm_100"))
    by_value, by_key = tiles_of(torch_dtype, DHQK, DHHV, device)
    tiles, full, part = (by_key, DHHV, DHQK) if walk in ("dq", "dk") else (by_value, DHQK, DHHV)
    dot, precision = operands(torch_dtype)
    L = longest(torch_dtype, device)
    constants = {
        "FULL_WIDTH": full, "TILE_WIDTH": part, "SLICE": tiles.slice, "TILE": tiles.tile,
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
        return "i32" if is_number or re.fullmatch(STRIDE, name) else "*fp32"

    types = {name: type_of(name) for name in kernel.arg_names}
    return walk if out else f"{walk}, first pass", kernel, types, constants, tiles.warps


def slstm_variant(target, dtype, width, name, back):
    import torch
    from keras_xlstm_triton import slstm_scan
    from keras_xlstm_triton.slstm import ROWS, operands, plan
    from triton import language as tl

    # As `shared_memory` says of it.
    shared = 0 if target.startswith("gfx") else SHARED[target] * 1024
    torch_dtype, DH, kernel = getattr(torch, dtype), int(width), getattr(slstm_scan, name)
    sizes, (dot, precision) = plan(torch_dtype, DH, back, shared), operands(torch_dtype, back)
    dot = str(dot).split(".")[1]
    constants = {
        "DH": DH, "ROWS": ROWS, "TILE": sizes.tile, "SLICE": sizes.slice, "STAGES": sizes.stages,
        "ON_CHIP": sizes.on_chip, "MASK": True, "RESET": True, "SCALE": True,
        "DOT": getattr(tl, dot), "PRECISION": precision,
    }  # fmt: skip
    given = dict.fromkeys(constants, "constexpr") | dict.fromkeys(("happens", "cleared"), "*i8")
    given |= dict.fromkeys(("B", "S", "NH", "KIND"), "i32")
    given |= {"gates": f"*{DTYPES[dtype]}", "R": f"*{DTYPES[dot]}"}
    types = {
        argument: given.get(argument, "i32" if re.fullmatch(STRIDE, argument) else "*fp32")
        for argument in kernel.arg_names
    }
    return name, kernel, types, constants, sizes.warps


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
    target, dtype, widths, _, _, spills, shared, tensor_cores = row
    if shared > SHARED[target] * 1024:
        yield f"needs {shared} bytes of shared memory"
    if spills and (dtype == "bfloat16" or "x" not in widths) and target in ("sm_90", "sm_100"):
        yield f"spills {spills} bytes"
    if dtype != "float32" and not tensor_cores:
        yield "has no instruction for tensor cores"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", nargs="*", choices=SHARED, required=True, metavar="TARGET")
    parser.add_argument("--widths", nargs="+", default=WIDTHS, metavar="DHQKxDHHV or DH")
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    parser.add_argument("--walks", nargs="+", choices=sorted({name for name, _ in WALKS + LOOPS}))
    options = parser.parse_args()
    cases = product(options.compile or SHARED, options.dtypes, options.widths)
    columns = zip(
        *(
            (*case, *walk)
            for case in cases
            for walk in (WALKS if "x" in case[-1] else LOOPS)
            if walk[0] in (options.walks or walk)
        ),
        strict=True,
    )
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
