"""The sLSTM of `slstm_walk.py` on a GPU, through Pallas and Triton.

Arrays are (B, ..., NH, DH), where they lie. The grid is heads and tiles of rows: a program walks
through the whole sequence, with the state in registers. It reads R for every step, from the caches,
in squares that tensor cores take. Where rows do not fill a tile, the last of them is computed more
than once, and written with the same numbers. Where columns do not, loads and stores are masked.

A float32 product is three of tf32, which lose as little as float32 does. On FP32 units alone, its
operands would not fit the registers.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

ROWS = 16  # the least that Triton multiplies


class Part:
    """What a program has: a tile of rows of a head, and pieces of so many columns."""

    def __init__(self, B, S, DH, piece, exact):
        self.S, self.DH, self.piece, self.exact = S, DH, piece, exact
        self.pieces = range(pl.cdiv(DH, piece))
        self.head = pl.program_id(0)
        self.rows = rows_of_tile(pl.program_id(1), B)

    def read(self, ref, *index):
        """(ROWS, piece), float32. The last index is the number of the piece."""
        return load(*self.at(ref, index)).astype("float32")

    def read_row(self, ref, gate, p):
        """(1, piece), of an array that has one row."""
        columns = self.columns(p)
        return load(ref.at[0, gate, self.head, columns], self.there(columns))

    def read_weights(self, ref, gate, k, p):
        """(piece, piece): from piece k to piece p."""
        before, after = self.columns(k, axis=0), self.columns(p)
        return load(ref.at[self.head, gate, before, after], self.there(before, after))

    def read_flag(self, ref, t):
        """(ROWS, piece), the same in each column."""
        return jnp.broadcast_to(ref[self.rows, t][:, None], (ROWS, self.piece))

    def write(self, ref, x, *index):
        at, mask = self.at(ref, index)
        plgpu.store(at, x, mask=mask)

    def walk(self, body, start, end, back=False):
        """Carries what is at `start` through `body(t, carry)` to `end`."""

        def turn(k, carry):
            return body(self.S - 1 - k if back else k, carry)

        carry = [tuple(self.read(start, k, p) for k in range(4)) for p in self.pieces]
        carry = lax.fori_loop(0, self.S, turn, carry)
        for p, values in zip(self.pieces, carry, strict=True):
            for k, x in enumerate(values):
                self.write(end, x, k, p)

    def at(self, ref, index):
        """Where a piece lies, and which of it is there, `None` for all."""
        *between, p = index
        columns = self.columns(p)
        return ref.at[self.rows[:, None], *between, self.head, columns], self.there(columns)

    def columns(self, p, axis=1):
        """Of piece p, along an axis of two."""
        shape = (1, self.piece) if axis else (self.piece, 1)
        return p * self.piece + lax.broadcasted_iota(jnp.int32, shape, axis)

    def there(self, *columns):
        if self.DH % self.piece == 0:
            return None
        return functools.reduce(jnp.logical_and, [x < self.DH for x in columns])


def rows_of_tile(number, B):
    return jnp.minimum(number * ROWS + jnp.arange(ROWS), B - 1)


def load(at, mask):
    return plgpu.load(at, mask=mask, other=None if mask is None else 0)


def arrange(x):
    """(B, ..., NH, DH) to what the kernels get, and back."""
    return x


def arrange_flags(flags):
    return flags


def axes(between, rows="B"):
    return f"{rows} {between} NH DH"


FLAGS = "B S"


def rows_of(B):
    return ROWS


def launch(kernel, interpret, sizes, arrays, results):
    """Runs a kernel.

    Args:
        kernel: `slstm_walk.forward` or `backward`.
        interpret: bool, whether to compute the same on a CPU.
        sizes: dict, name of an axis to its size.
        arrays: list of pairs, an array or `None`, and the names of its axes.
        results: for each array to return, in float32, the names of its axes.
    """
    B, S, NH, DH = (sizes[name] for name in ("B", "S", "NH", "DH"))
    piece = min(max(pl.next_power_of_2(DH), 16), 64)
    # A CPU has no tf32.
    exact = lax.Precision.HIGHEST if interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    def program(inputs, *outputs):
        kernel(Part(B, S, DH, piece, exact), *inputs, *outputs)

    shapes = (tuple(sizes[name] for name in axes.split()) for axes in results)
    return pl.pallas_call(
        program,
        grid=(NH, pl.cdiv(B, ROWS)),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name=f"slstm_{kernel.__name__}",
    )([array for array, _ in arrays])
