"""The Triton kernels in the real compilers, without a GPU; with `--device`, `gpu.py`: on one.

python examples/benchmarks/kernels.py --compile                  a table, for all targets
python examples/benchmarks/kernels.py --compile sm_90 --widths 256x512 64 --dtypes bfloat16
python examples/benchmarks/kernels.py --compile sm_90 --every --widths 40x20 64x64 256x512 512x512
python examples/benchmarks/kernels.py --device gpu --json results.json

The variants of the mLSTM's walk and of the sLSTM's loops (`mlstm_walk.py` and `slstm_scan.py` in
`backends/keras_xlstm_triton`) that a call usually gets, or with `--every` all that it may get, are
compiled ahead of time, and so is the mLSTM's decode step. The table says what a program needs of a
chip: registers of a thread, bytes of a thread that did not fit them (spills), shared memory of a
program; and how many instructions for tensor cores it has. The exit status is 1 where one needs
more than the chip has, or spills on sm_90 or sm_100.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")

SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program
WIDTHS = "40x20", "64x64", "128x256", "256x512", "512x512", "1024x96"  # DHQK x DHHV of the mLSTM
WIDTHS += "16", "64", "128", "256"  # DH of the sLSTM
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
# Of the walks that `mlstm_walk.py` lists, and of their first pass over segments, which has no out.
WALKS = ("h", True), ("dq", True), ("dk", True), ("dv", True), ("dq", False), ("dk", False)
WALKS += (("step", True),)  # the decode step, which is no walk
LOOPS = ("forward", False), ("backward", True)  # of `slstm_scan.py`
TENSOR_CORES = r"wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma"
COLUMNS = ("target", "dtype", "widths", "walk", "L, slice x tile of the memory")
COLUMNS += ("registers", "spills", "shared", "tensor cores")


def compiled(target, dtype, widths, walk, out, every=False):
    """Rows of the table: of the usual variant, or of every one."""
    import torch
    from keras_xlstm_triton.mlstm_plan import Device, variants

    if "x" not in widths:
        return [slstm_variant(target, dtype, widths, walk, out)]
    if walk == "step":
        return list(decode_step(target, dtype, widths))
    torch_dtype, (DHQK, DHHV) = getattr(torch, dtype), map(int, widths.split("x"))
    # As `Device.of` says of it.
    device = Device(reads_shared_memory=target in ("sm_90", "sm_100"))
    by_key = walk in ("dq", "dk")
    found = [(L, tiles[by_key]) for L, tiles in variants(torch_dtype, DHQK, DHHV, device)]
    found = list(dict.fromkeys(found)) if every else found[:1]
    return [variant(target, dtype, widths, walk, out, L, tiles) for L, tiles in found]


def variant(target, dtype, widths, walk, out, L, tiles):
    import torch
    from keras_xlstm_triton.mlstm import operands, registers
    from keras_xlstm_triton.mlstm_walk import walk as kernel

    DHQK, DHHV = map(int, widths.split("x"))
    full, part = (DHHV, DHQK) if walk in ("dq", "dk") else (DHQK, DHHV)
    dot, precision = operands(getattr(torch, dtype))
    constants = {
        "FULL_WIDTH": full, "TILE_WIDTH": part, "SLICE": tiles.slice, "TILE": tiles.tile,
        "ON_CHIP": tiles.on_chip, "L": L, "WALK": walk, "OUT": out, "DOT": dot,
        "PRECISION": precision,
    }  # fmt: skip
    types = dict.fromkeys(("a", "b", "c", "d", "out"), f"*{DTYPES[dtype]}") | {
        "C_kept": "*bf16" if dtype == "bfloat16" else "*fp32",
        "eps": "fp32",
        **dict.fromkeys(("S", "NH", "segments", "chunks", "chunks_each"), "i32"),
    }
    strides = {f"{x}_{axis}" for x in "abcd" for axis in ("batch", "step", "head")}
    types |= dict.fromkeys(strides, "i32")
    aligned = {x for x in strides if (full if x[0] in "ab" else part) % 16 == 0}
    name = walk if out else f"{walk}, first pass"
    options = {"num_warps": tiles.warps, **registers(out, target.startswith("gfx"))}
    row = for_target(target, kernel, types, constants, aligned, options)
    return target, dtype, widths, name, form(L, tiles), *row


def form(L, tiles):
    return f"{L}, {tiles.slice}x{tiles.tile} {'on' if tiles.on_chip else 'off'} chip"


def decode_step(target, dtype, widths):
    """The decode step, by the tiles of many heads and of few."""
    from keras_xlstm_triton.mlstm_plan import Device, step_tiles
    from keras_xlstm_triton.mlstm_update import update

    DHQK, DHHV = map(int, widths.split("x"))
    strides = {f"{x}_{axis}" for x in "qkv" for axis in ("batch", "head")}
    types = dict.fromkeys(("q", "k", "v", "h"), f"*{DTYPES[dtype]}")
    types |= dict.fromkeys(strides | {"NH"}, "i32") | {"scale": "fp32", "eps": "fp32"}
    aligned = {x for x in strides if (DHHV if x[0] == "v" else DHQK) % 16 == 0}
    for rows, tile in dict.fromkeys(step_tiles(n, DHQK, DHHV, Device()) for n in (8, 1024)):
        constants = {"DHQK": DHQK, "DHHV": DHHV, "ROWS": rows, "TILE": tile}
        row = for_target(target, update, types, constants, aligned, {"num_warps": 4})
        yield target, dtype, widths, "step", f"{rows}x{tile}", *row


def for_target(target, kernel, types, constants, aligned, options):
    """Registers, spills, shared memory and instructions for tensor cores.

    `types` are those of arguments that are no pointers to float32; pointers and the strides in
    `aligned` are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = dict.fromkeys(kernel.arg_names, "*fp32") | types
    types |= dict.fromkeys(constants, "constexpr")
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(types.items())
        if kind[0] == "*" or name in aligned
    }
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    source = ASTSource(kernel, types, constants, attributes)
    result = triton.compile(source, target=gpu, options=options | {"num_stages": 1})
    found = len(re.findall(TENSOR_CORES, result.asm["amdgcn" if amd else "ptx"]))
    return *resources_of(result, amd), result.metadata.shared, found


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
    strides = {x for x in kernel.arg_names if re.fullmatch("(gates|dh)_(batch|step|gate|head)", x)}
    types = dict.fromkeys(("happens", "cleared"), "*i8")
    types |= dict.fromkeys({"B", "S", "NH", "KIND"} | strides, "i32")
    types |= {"gates": f"*{DTYPES[dtype]}", "R": f"*{DTYPES[dot]}"}
    types = {x: kind for x, kind in types.items() if x in kernel.arg_names}
    row = for_target(
        target, kernel, types, constants, strides | {"KIND"}, {"num_warps": sizes.warps}
    )
    place = "on chip" if sizes.on_chip else "read each step"
    return target, dtype, width, name, f"{sizes.slice}x{sizes.tile} {place}", *row


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
    target, dtype, _, walk, _, _, spills, shared, tensor_cores = row
    if shared > SHARED[target] * 1024:
        yield f"needs {shared} bytes of shared memory"
    if spills and target in ("sm_90", "sm_100"):
        yield f"spills {spills} bytes"
    if dtype != "float32" and walk != "step" and not tensor_cores:
        yield "has no instruction for tensor cores"


def head_widths(text):
    """Those of keys and values, or of a head of the sLSTM."""
    sizes = text.split("x")
    if not (1 <= len(sizes) <= 2 and all(x.isdecimal() and int(x) > 0 for x in sizes)):
        raise argparse.ArgumentTypeError(f"must be like 128x256 or 64, not {text!r}")
    return text


def main():
    if "--device" in sys.argv:
        import gpu

        return gpu.main()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", nargs="*", choices=SHARED, required=True, metavar="TARGET")
    parser.add_argument(
        "--widths", nargs="+", type=head_widths, default=WIDTHS, metavar="DHQKxDHHV or DH"
    )
    parser.add_argument("--dtypes", nargs="+", default=[*DTYPES], choices=DTYPES)
    names = sorted({name for name, _ in WALKS + LOOPS})
    parser.add_argument("--walks", nargs="+", choices=names)
    parser.add_argument("--every", action="store_true", help="the plans too that may be timed")
    options = parser.parse_args()
    cases = product(options.compile or SHARED, options.dtypes, options.widths)
    columns = zip(
        *(
            (*case, *walk, options.every)
            for case in cases
            for walk in (WALKS if "x" in case[-1] else LOOPS)
            if walk[0] in (options.walks or walk)
        ),
        strict=True,
    )
    broken = 0
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    with ProcessPoolExecutor(2) as pool:
        for row in chain.from_iterable(pool.map(compiled, *columns)):
            found = ", ".join(problems(row))
            broken += bool(found)
            print("|", " | ".join(map(str, row)), "|", f" <- {found}" if found else "", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
