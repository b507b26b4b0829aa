"""The mLSTM of `mlstm_chunk.py` on a GPU, through Pallas and Triton.

A program walks the chunks of one head, with one tile of DHHV. C and n, or backward their gradients,
stay on chip for the whole walk. Widths are powers of two, from 16 on; lengths are any.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_xlstm_pallas import mlstm_chunk
from keras_xlstm_pallas.mlstm_chunk import Weights

# Each function takes and returns what its namesake in `mlstm_tpu.py` does.


def outputs(plan, q, k, v, weights, C, n):
    launch = Launch(plan, v)

    def kernel(q, k, v, w, C_in, n_in, h, nq, C_out, n_out):
        part = Part(launch)

        def chunk(c, memory):
            values = part.keys(q, c), part.keys(k, c), part.values(v, c)
            h_t, nq_t, C, n = mlstm_chunk.forward(
                *values, *memory, part.weights(w, c), plan.numbers, plan.eps
            )
            part.store_values(h, c, h_t)
            part.store_row(nq, c, nq_t)
            return C, n

        C, n = part.walk(chunk, C_in, n_in)
        part.store_memory(C_out, n_out, C, n)

    rows, n_of_tiles = launch.of_tiles(launch.rows), launch.of_tiles(n.shape)
    results = (v.shape, v.dtype), (rows, jnp.float32), (C.shape, C.dtype), (n_of_tiles, n.dtype)
    return launch(kernel, results, q, k, v, weights, C, n)


def starts(plan, k, v, weights, C, n):
    launch = Launch(plan, v)

    def kernel(k, v, w, C_in, n_in, C_start, n_start):
        part = Part(launch)

        def chunk(c, memory):
            part.store_memory(C_start, n_start, *memory, c)
            values = part.keys(k, c), part.values(v, c)
            return mlstm_chunk.next_memory(*values, *memory, part.weights(w, c), plan.numbers)

        part.walk(chunk, C_in, n_in)

    each = launch.rows[:3]
    results = ((*each, *C.shape[2:]), plan.kept), (launch.of_tiles((*each, plan.DHQK)), n.dtype)
    return launch(kernel, results, k, v, weights, C, n)


def gradients(plan, q, k, v, dh, weights, C, n, dC, dn):
    launch = Launch(plan, v)

    def kernel(q, k, v, dh, w, C, n, dC_in, dn_in, dq, dk, dv, di, dlog_f, dC_out, dn_out):
        part = Part(launch)

        def chunk(number, memory):
            c = launch.chunks - 1 - number
            values = part.keys(q, c), part.keys(k, c), part.values(v, c), part.values(dh, c)
            w_c, starts = part.weights(w, c), part.memory(C, n, c)
            w_c = w_c._replace(e=part.of_n(w_c.e))
            dq_t, dk_t, dv_t, di_t, dlog_f_t, dC, dn = mlstm_chunk.backward(
                *values, *starts, *memory, w_c, plan.numbers
            )
            part.store_keys(dq, c, dq_t)
            part.store_keys(dk, c, dk_t)
            part.store_values(dv, c, dv_t)
            part.store_row(di, c, di_t)
            part.store_row(dlog_f, c, dlog_f_t)
            return dC, dn

        dC, dn = part.walk(chunk, dC_in, dn_in, part.of_n)
        part.store_memory(dC_out, dn_out, dC, dn)

    f32 = jnp.float32
    keys = launch.of_tiles(q.shape), q.dtype if launch.tiles == 1 else f32
    rows, dn_of_tiles = launch.of_tiles(launch.rows), launch.of_tiles(dn.shape)
    results = keys, keys, (v.shape, v.dtype), (rows, f32), (rows, f32)
    results = *results, (dC.shape, f32), (dn_of_tiles, f32)
    return launch(kernel, results, q, k, v, dh, weights, C, n, dC, dn)


class Launch:
    def __init__(self, plan, v):
        self.plan, (self.B, self.S, self.NH, DHHV) = plan, v.shape
        self.chunks, self.tiles = -(-self.S // plan.L), DHHV // plan.T
        self.rows = self.B, self.NH, self.chunks, plan.L

    def of_tiles(self, shape):
        return self.tiles, *shape

    def __call__(self, kernel, results, *arrays):
        return pl.pallas_call(
            kernel,
            grid=(self.B, self.NH, self.tiles),
            out_shape=[jax.ShapeDtypeStruct(*x) for x in results],
            compiler_params=plgpu.CompilerParams(num_warps=self.plan.warps, num_stages=1),
            interpret=self.plan.interpreted,
        )(*arrays)


class Part:
    """What a program reads and writes: its own, and of that what belongs to chunk c."""

    def __init__(self, launch):
        self.launch, self.plan = launch, launch.plan
        self.b, self.h, self.t = map(pl.program_id, range(3))
        self.tile = pl.ds(self.t * self.plan.T, self.plan.T)

    def walk(self, chunk, C, n, of_n=lambda n: n):
        memory = C[self.b, self.h, :, self.tile], of_n(n[self.b, self.h][None])
        return lax.fori_loop(0, self.launch.chunks, chunk, memory)

    def of_n(self, x):
        """In the first tile, to which n belongs; elsewhere 0."""
        return jnp.where(self.t == 0, x, 0.0)

    def keys(self, x, c):
        return self.load(x.at[self.b, self.steps(c), self.h, :], c)

    def values(self, x, c):
        return self.load(x.at[self.b, self.steps(c), self.h, self.tile], c)

    def store_keys(self, out, c, x):
        self.store(out.at[self.t, self.b, self.steps(c), self.h, :], c, x)

    def store_values(self, out, c, x):
        self.store(out.at[self.b, self.steps(c), self.h, self.tile], c, x)

    def steps(self, c):
        return pl.ds(c * self.plan.L, self.plan.L)

    def load(self, part, c):
        if self.launch.S % self.plan.L == 0:
            return plgpu.load(part)
        return plgpu.load(part, mask=self.happens(part.shape, c), other=0)

    def store(self, part, c, x):
        some = self.launch.S % self.plan.L
        mask = self.happens(x.shape, c) if some else None
        plgpu.store(part, x.astype(part.dtype), mask=mask)

    def happens(self, shape, c):
        step = lax.broadcasted_iota(jnp.int32, shape, 0)
        return step < self.launch.S - c * self.plan.L

    def weights(self, w, c):
        rows = [w[self.b, self.h, c, x] for x in range(8)]
        return Weights(*(x[:, None] for x in rows[:6]), *(x[None] for x in rows[6:]))

    def store_row(self, out, c, x):
        out[self.t, self.b, self.h, c] = x[0]

    def memory(self, C, n, c):
        C = C[self.b, self.h, c, :, self.tile].astype(jnp.float32)
        return C, n[self.t, self.b, self.h, c][None]

    def store_memory(self, C_out, n_out, C, n, *c):
        """After the last step, or with `c` at the start of a chunk."""
        C_out[self.b, self.h, *c, :, self.tile] = C.astype(C_out.dtype)
        n_out[self.t, self.b, self.h, *c] = n[0]
