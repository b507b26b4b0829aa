"""The sLSTM of `slstm_walk.py` on a TPU, through Pallas and Mosaic.

Arrays are (NH, ..., B, DH): rows and columns are what the chip has in tiles of 8 x 128. The grid is
heads, tiles of rows, blocks of steps. The blocks come one after the other, and while one is
computed, the next is on its way. R and the state stay in VMEM; DH is one piece.

Nothing is padded: what a block has beyond the array is rows and steps that nobody reads.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_xlstm_pallas import slstm_walk

VMEM = 6 * 2**20  # bytes, for a block of steps


@dataclass(frozen=True)
class Part:
    """What a program holds at a time: `steps` steps of `rows` rows of a head."""

    S: int
    steps: int
    rows: int
    DH: int

    pieces = (0,)
    exact = lax.Precision.HIGHEST

    def read(self, ref, *index_and_piece):
        """(rows, DH), float32."""
        return ref[index_and_piece[:-1]].astype("float32")

    read_row = read  # (1, DH): all of an array that has one row

    def write(self, ref, x, *index_and_piece):
        ref[index_and_piece[:-1]] = x

    def read_weights(self, ref, gate, k, p):
        return ref[gate]

    def read_flag(self, ref, t):
        """(rows, DH), the same in each column."""
        return jnp.broadcast_to(ref[t], (self.rows, self.DH))

    def walk(self, body, start, end, back=False):
        """Carries what is at `start` through `body(t, carry)` to `end`, by the steps of a block."""
        block, blocks = pl.program_id(2), pl.cdiv(self.S, self.steps)

        @pl.when(block == 0)
        def _():
            end[...] = start[...]

        if back:
            block = blocks - 1 - block
        steps = jnp.minimum(self.steps, self.S - block * self.steps)

        def turn(k, carry):
            return body(steps - 1 - k if back else k, carry)

        carry = lax.fori_loop(0, steps, turn, [tuple(end[k] for k in range(4))])
        for k, x in enumerate(carry[0]):
            end[k] = x


def arrange(x):
    """(B, ..., NH, DH) to what the kernels get, and back."""
    return jnp.swapaxes(x, 0, -2)


def arrange_flags(flags):
    return flags.T[..., None]


def axes(between, rows="B"):
    return f"NH {between} {rows} DH"


FLAGS = "S B ONE"


def rows_of(B):
    return min(pl.cdiv(B, 8) * 8, 128)


def launch(kernel, interpret, sizes, arrays, results):
    """Runs a kernel: see `slstm_gpu.py`."""
    B, S, NH, DH = (sizes[name] for name in ("B", "S", "NH", "DH"))
    rows = rows_of(B)
    tile = 4 * rows * pl.cdiv(DH, 128) * 128  # bytes
    walked = [names for _, names in arrays] + [*results]
    tiles = sum(
        math.prod(sizes[name] for name in names.split() if name in ("G", "CNM"))
        for names in walked
        if "S" in names.split()
    )
    steps = min(max(VMEM // (2 * tiles * tile), 1), S)
    blocks = pl.cdiv(S, steps)
    part = Part(S, steps, rows, DH)

    def program(inputs, *outputs):
        kernel(part, *inputs, *outputs)

    def spec(names):
        names = names.split()
        block = sizes | {"NH": None, "S": steps, "B": rows}

        def at(head, row, number):
            number = blocks - 1 - number if kernel is slstm_walk.backward else number
            return tuple({"NH": head, "S": number, "B": row}.get(name, 0) for name in names)

        # What is the same for all rows and steps need not be there twice.
        once = {} if {"S", "B"} & {*names} else {"pipeline_mode": pl.Buffered(1)}
        return pl.BlockSpec(tuple(block[name] for name in names), at, **once)

    shapes = (tuple(sizes[name] for name in names.split()) for names in results)
    return pl.pallas_call(
        program,
        grid=(NH, pl.cdiv(B, rows), blocks),
        in_specs=[[None if x is None else spec(names) for x, names in arrays]],
        out_specs=[spec(names) for names in results],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name=f"slstm_{kernel.__name__}",
    )([x for x, _ in arrays])
