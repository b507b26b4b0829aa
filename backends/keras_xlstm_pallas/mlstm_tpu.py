"""The mLSTM of `mlstm_chunk.py` on a TPU: a core walks the chunks of a head one after the other.

The grid is (B, NH, tiles of DHHV, chunks). Along its last axis, which runs in order, C and n stay
in scratch memory, or backward their gradients.

A block of a sequence is (L, width), of one head. Where the width is a multiple of 128, the lanes of
a register, it is cut out of (B, S, NH, width) as that lies in memory. Sequences of other widths are
copied to (B, NH, S, width), and back.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from keras_xlstm_pallas import mlstm_chunk
from keras_xlstm_pallas.mlstm_chunk import Weights

LANES = 128


def outputs(plan, q, k, v, weights, C, n):
    """h; of each tile n^T q (tiles, B, NH, chunks, L); C and of each tile n after the last step."""
    grid = Grid(plan, v)

    def kernel(q, k, v, w, C_in, n_in, h, nq, C_out, n_out, C, n):
        start(C, C_in[:], n, n_in[:])
        values = map(grid.steps, (q, k, v))
        h_t, nq[:], C[:], n[:] = mlstm_chunk.forward(
            *values, C[:], n[:], read(w), plan.numbers, plan.eps
        )
        h[:] = h_t.astype(h.dtype)
        C_out[:], n_out[:] = C[:], n[:]  # what the last chunk writes stays

    keys, values = grid.keys(q.dtype), grid.values(v.dtype)
    inputs = keys, keys, values, grid.weights, grid.C, grid.n
    results = values, grid.row_of_tiles, grid.C, grid.n_of_tiles
    return grid.call(kernel, inputs, results, q, k, v, weights, C, n)


def starts(plan, k, v, weights, C, n):
    """C (B, NH, chunks, DHQK, DHHV) and n (tiles, B, NH, chunks, DHQK) at the starts of chunks."""
    grid = Grid(plan, v)

    def kernel(k, v, w, C_in, n_in, C_start, n_start, C, n):
        start(C, C_in[:], n, n_in[:])
        C_start[:], n_start[:] = C[:].astype(C_start.dtype), n[:]
        values = map(grid.steps, (k, v))
        C[:], n[:] = mlstm_chunk.next_memory(*values, C[:], n[:], read(w), plan.numbers)

    inputs = grid.keys(k.dtype), grid.values(v.dtype), grid.weights, grid.C, grid.n
    return grid.call(kernel, inputs, grid.starts, k, v, weights, C, n)


def gradients(plan, q, k, v, dh, weights, C, n, dC, dn):
    """dq, dk (tiles, B, S, NH, DHQK), dv; di, dlog_f (tiles, B, NH, chunks, L); dC, dn (tiles, ..).

    C and n are given as `starts` has them, dC and dn after the last step. What has an axis of tiles
    is a sum over them.
    """
    grid = Grid(plan, v, back=True)

    def kernel(q, k, v, dh, w, C, n, dC_in, dn_in, dq, dk, dv, di, dlog_f, dC_out, dn_out, dC, dn):
        has_n = pl.program_id(2) == 0
        start(dC, dC_in[:], dn, jnp.where(has_n, dn_in[:], 0.0))
        w = read(w)
        w = w._replace(e=jnp.where(has_n, w.e, 0.0))
        values = map(grid.steps, (q, k, v, dh))
        dq_t, dk_t, dv_t, di[:], dlog_f[:], dC[:], dn[:] = mlstm_chunk.backward(
            *values, C[:].astype(jnp.float32), n[:], dC[:], dn[:], w, plan.numbers
        )
        for x, x_t in (dq, dq_t), (dk, dk_t), (dv, dv_t):
            x[:] = x_t.astype(x.dtype)
        dC_out[:], dn_out[:] = dC[:], dn[:]

    keys, values, row = grid.keys(q.dtype), grid.values(v.dtype), grid.row_of_tiles
    parts = grid.of_tiles(grid.keys(q.dtype if grid.tiles == 1 else jnp.float32))
    inputs = keys, keys, values, values, grid.weights, *grid.starts, grid.C, grid.n
    results = parts, parts, values, row, row, grid.C, grid.n_of_tiles
    return grid.call(kernel, inputs, results, q, k, v, dh, weights, C, n, dC, dn)


def start(C, C_in, n, n_in):
    @pl.when(pl.program_id(3) == 0)
    def _():
        C[:], n[:] = C_in, n_in


def read(w):
    rows = w[:]
    columns = rows.T
    return Weights(*(columns[:, x : x + 1] for x in range(6)), rows[6:7], rows[7:8])


@dataclass(frozen=True)
class Array:
    """An array, and what a program sees of it."""

    outside: tuple  # its shape
    inside: tuple  # as the kernel has it
    dtype: jnp.dtype
    block: tuple  # of its last axes; of those before, a program sees one index
    index: str  # of the block: b, h, t and c as the program has them, w for h and t, or 0
    heads_first: bool = False

    def enter(self, x):
        return (jnp.swapaxes(x, 1, 2) if self.heads_first else x).reshape(self.inside)

    def leave(self, x):
        return (jnp.swapaxes(x, -3, -2) if self.heads_first else x).reshape(self.outside)


class Grid:
    def __init__(self, plan, v, back=False):
        self.plan, (self.B, self.S, self.NH, self.DHHV) = plan, v.shape
        self.chunks, self.tiles = -(-self.S // plan.L), self.DHHV // plan.T
        self.back = back

        def array(*shape, block, index, one=False):
            """With `one`, of an axis more before the last."""
            inside = (*shape[:-1], 1, shape[-1]) if one else shape
            return Array(shape, inside, jnp.float32, block, index)

        heads, DHQK, row = (self.B, self.NH), plan.DHQK, (1, plan.L)
        chunks, memory = (*heads, self.chunks), (DHQK, plan.T)
        self.weights = array(*chunks, 8, plan.L, block=(8, plan.L), index="bhc00")
        self.C = array(*heads, DHQK, self.DHHV, block=memory, index="bh0t")
        self.n = array(*heads, DHQK, block=(1, DHQK), index="bh00", one=True)
        C = array(*chunks, DHQK, self.DHHV, block=memory, index="bhc0t")
        n = array(*chunks, DHQK, block=(1, DHQK), index="bhc00", one=True)
        self.starts = replace(C, dtype=plan.kept), self.of_tiles(n)
        self.n_of_tiles = self.of_tiles(self.n)
        self.row_of_tiles = self.of_tiles(
            array(*chunks, plan.L, block=row, index="bhc00", one=True)
        )

    def of_tiles(self, array):
        outside, inside = ((self.tiles, *shape) for shape in (array.outside, array.inside))
        return replace(array, outside=outside, inside=inside, index="t" + array.index)

    def keys(self, dtype):
        return self.sequence(self.plan.DHQK, self.plan.DHQK, "h0", dtype)

    def values(self, dtype):
        return self.sequence(self.DHHV, self.plan.T, "wt", dtype)

    def sequence(self, width, tile, index, dtype):
        outside, block = (self.B, self.S, self.NH, width), (self.plan.L, tile)
        if width % LANES == 0:
            inside = (self.B, self.S, self.NH * width)
            return Array(outside, inside, dtype, block, "bc" + index[0])
        inside = (self.B, self.NH, self.S, width)
        return Array(outside, inside, dtype, block, "bhc" + index[1], heads_first=True)

    def steps(self, x):
        """A chunk of a sequence, whose steps beyond the last are 0."""
        if self.S % self.plan.L == 0:
            return x[:]
        step = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(step < self.S - self.chunk(pl.program_id(3)) * self.plan.L, x[:], 0)

    def chunk(self, number):
        return self.chunks - 1 - number if self.back else number

    def spec(self, array):
        def index(b, h, t, c):
            numbers = {"b": b, "h": h, "t": t, "w": h * self.tiles + t, "0": 0}
            numbers["c"] = self.chunk(c)
            return tuple(numbers[x] for x in array.index)

        one = (None,) * (len(array.inside) - len(array.block))
        return pl.BlockSpec(one + array.block, index)

    def call(self, kernel, inputs, results, *arrays):
        order = ("parallel", "parallel", "parallel", "arbitrary")
        out = pl.pallas_call(
            kernel,
            grid=(self.B, self.NH, self.tiles, self.chunks),
            in_specs=[self.spec(x) for x in inputs],
            out_specs=[self.spec(x) for x in results],
            out_shape=[jax.ShapeDtypeStruct(x.inside, x.dtype) for x in results],
            scratch_shapes=[
                pltpu.VMEM((self.plan.DHQK, self.plan.T), jnp.float32),
                pltpu.VMEM((1, self.plan.DHQK), jnp.float32),
            ],
            compiler_params=pltpu.CompilerParams(dimension_semantics=order),
            interpret=pltpu.InterpretParams() if self.plan.interpreted else False,
        )(*(x.enter(y) for x, y in zip(inputs, arrays, strict=True)))
        return [x.leave(y) for x, y in zip(results, out, strict=True)]
