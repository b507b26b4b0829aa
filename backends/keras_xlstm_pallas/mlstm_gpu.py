"""The mLSTM on a GPU, through Pallas and Triton; the mathematics is that of `mlstm_chunk.py`.

A walk through the chunks computes the memories before each of them, which go through device memory,
and backward another their gradients after each. Each entry of a memory is its own, so a program
walks with a tile of it. All else is of single chunks, on programs that each compute a tile of what
they return: L steps of so many columns. Where they sum over a width they load it slice by slice,
which are as wide as tiles. So what a program holds does not grow with the widths.

Widths are filled up to whole tiles; lengths are any.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from keras_xlstm_pallas.mlstm_chunk import Weights, column_sums, floats, row_sums, steps

# Functions without an underscore take and return what their namesakes in `mlstm_tpu.py` do.


def outputs(plan, q, k, v, weights, C, n):
    C, n, C_end, n_end = _walk(plan, k, v, weights, C, n)
    launch = Launch(plan, v)

    def mlstm_h(q, k, v, w, C, n, h, nq):
        part = Part(launch)
        tile, w = part.tile(plan.T), part.weights(w)

        def add(keys, sums):
            inner, from_start, nq = sums
            q_s, k_s = part.load(q, keys), part.load(k, keys)
            inner += plan.numbers.product(q_s, k_s, 1, 1)
            from_start += plan.numbers.product(q_s, part.memory(C, keys, tile))
            return inner, from_start, nq + row_sums(floats(q_s) * part.row(n, keys))

        sums = part.zeros(plan.L), part.zeros(plan.T), part.zeros(1)
        inner, from_start, from_n = part.over(plan.DHQK, plan.TK, add, sums)
        inner, read = inner * w.inside(), w.from_start * plan.numbers.scale
        num = plan.numbers.product(inner, part.load(v, tile)) + read * from_start
        nq_t = row_sums(inner) + read * from_n
        part.store(h, tile, num / (jnp.maximum(jnp.abs(nq_t), w.r) + plan.eps))
        part.store_steps(nq, nq_t, once=True)

    results = (v.shape, v.dtype), (launch.rows, jnp.float32)
    h, nq = launch(mlstm_h, launch.of_chunks(plan.DHHV // plan.T), results, q, k, v, weights, C, n)
    return h, nq[None], C_end, n_end[None]


def starts(plan, k, v, weights, C, n):
    return _walk(plan, k, v, weights, C, n)[:2]


def gradients(plan, q, k, v, dh, weights, C, n, dC, dn):
    dC, dn, dC_start, dn_start = _walk(plan, q, dh, weights, dC, dn, back=True)
    launch, product = Launch(plan, v), plan.numbers.product
    scale = plan.numbers.scale

    def mlstm_dq_dk(q, k, v, dh, w, C, n, dC, dn, dq, dk, d_from_start, d_to_end):
        part = Part(launch)
        tile, w = part.tile(plan.TK), part.weights(w)

        def add(values, sums):
            d_inner, from_start, to_end = sums
            v_s, dh_s = part.load(v, values), part.load(dh, values)
            d_inner += product(dh_s, v_s, 1, 1)
            from_start += product(dh_s, part.memory(C, tile, values), 1, 1)
            return d_inner, from_start, to_end + product(v_s, part.memory(dC, tile, values), 1, 1)

        sums = part.zeros(plan.L), part.zeros(plan.TK), part.zeros(plan.TK)
        d_inner, from_start, to_end = part.over(plan.DHHV, plan.T, add, sums)
        read, d_qk = w.from_start * scale, (d_inner * w.r + w.e) * w.inside()
        from_start = from_start * (read * w.r) + (read * w.e) * part.row(n, tile)
        to_end = (to_end + part.row(dn, tile)) * w.to_end
        q_t, k_t = part.load(q, tile), part.load(k, tile)
        part.store(dq, tile, product(d_qk, k_t) + from_start)
        part.store(dk, tile, product(d_qk, q_t, 0, 0) + to_end)
        part.store_steps(d_from_start, row_sums(from_start * floats(q_t)))
        part.store_steps(d_to_end, row_sums(to_end * floats(k_t)))

    def mlstm_dv(q, k, dh, w, dC, dv):
        part = Part(launch)
        tile, w = part.tile(plan.T), part.weights(w)

        def add(keys, sums):
            inner, to_end = sums
            q_s, k_s = part.load(q, keys), part.load(k, keys)
            inner += product(q_s, k_s, 1, 1)
            return inner, to_end + product(floats(k_s) * w.to_end, part.memory(dC, keys, tile))

        sums = part.zeros(plan.L), part.zeros(plan.T)
        inner, to_end = part.over(plan.DHQK, plan.TK, add, sums)
        inner *= w.inside() * w.r
        part.store(dv, tile, product(inner, part.load(dh, tile), 0, 0) + to_end)

    def mlstm_d_gates(q, k, v, dh, w, di, dlog_f):
        part = Part(launch)
        w = part.weights(w)

        def add(a, b, columns, total):
            return total + product(part.load(a, columns), part.load(b, columns), 1, 1)

        square = part.zeros(plan.L)
        inner = part.over(plan.DHQK, plan.TK, lambda *x: add(q, k, *x), square) * w.inside()
        d_inner = part.over(plan.DHHV, plan.T, lambda *x: add(dh, v, *x), square)
        d_inside = inner * (d_inner * w.r + w.e)  # of logarithms
        t, l = steps(plan.L)
        passing = product(d_inside, (t < l).astype(jnp.float32))  # [t, l]: over j < l
        di[part.at_steps(di)] = column_sums(d_inside)[0]
        dlog_f[part.at_steps(dlog_f)] = column_sums(jnp.where(t >= l, passing, 0.0))[0]

    f32 = jnp.float32
    keys, values = plan.DHQK // plan.TK, plan.DHHV // plan.T
    row, rows = (launch.rows, f32), ((keys, *launch.rows), f32)
    dq, dk, d_from_start, d_to_end = launch(
        mlstm_dq_dk,
        launch.of_chunks(keys),
        [(q.shape, q.dtype), (k.shape, k.dtype), rows, rows],
        *(q, k, v, dh, weights, C, n, dC, dn),
    )
    (dv,) = launch(mlstm_dv, launch.of_chunks(values), [(v.shape, v.dtype)], q, k, dh, weights, dC)
    di, dlog_f = launch(
        mlstm_d_gates, launch.of_chunks(1), [row, row], q, k, v, dh, weights, warps=8
    )

    # A gate at l is part of what lies between steps j < l and t >= l, see `mlstm_chunk.backward`.
    d_from_start, d_to_end = d_from_start.sum(0), d_to_end.sum(0)
    t, l = steps(plan.L)

    def over_steps(x, some):
        return jnp.einsum("bhct,tl->bhcl", x, some.astype(f32), precision=lax.Precision.HIGHEST)

    across = jnp.sum(dC.astype(f32) * C.astype(f32), (-1, -2)) + jnp.sum(dn * n, -1)
    across *= weights[:, :, :, Weights._fields.index("from_start"), -1]
    dlog_f += over_steps(d_from_start, t >= l) + over_steps(d_to_end, t < l) + across[..., None]
    return dq[None], dk[None], dv, (di + d_to_end)[None], dlog_f[None], dC_start, dn_start[None]


def _walk(plan, x, y, weights, C, n, back=False):
    """C and n before each chunk, and after the last. Or `back`, of the gradients of C and n after
    the last chunk, those after each, and before the first."""
    launch = Launch(plan, y)

    def mlstm_walk(x, y, w, C_in, n_in, C_kept, n_kept, C_out, n_out):
        part = Part(launch)
        keys, values = pl.ds(pl.program_id(2) * plan.TK, plan.TK), part.tile(plan.T)

        def chunk(number, memory):
            C, n = memory
            part.c = launch.chunks - 1 - number if back else number
            part.store_memory(C_kept, n_kept, (part.c,), keys, values, C, n)
            w_c, x_c = part.weights(w), floats(part.load(x, keys))
            of_C = of_n = w_c.to_end
            if back:
                read = w_c.from_start * plan.numbers.scale
                of_C, of_n = read * w_c.r, read * w_c.e
            left = w_c.over_chunk()
            C = left * C + plan.numbers.product(x_c * of_C, part.load(y, values), 0, 0)
            return C, left * n + column_sums(x_c * of_n)

        memory = C_in[part.b, part.h, keys, values], n_in[part.b, part.h, keys][None]
        C, n = lax.fori_loop(0, launch.chunks, chunk, memory)
        part.store_memory(C_out, n_out, (), keys, values, C, n)

    each = launch.rows[:3]
    kept = ((*each, *C.shape[2:]), plan.kept), ((*each, plan.DHQK), n.dtype)
    grid = launch.B, launch.NH, plan.DHQK // plan.TK, plan.DHHV // plan.T
    results = *kept, (C.shape, C.dtype), (n.shape, n.dtype)
    return launch(mlstm_walk, grid, results, x, y, weights, C, n)


class Launch:
    def __init__(self, plan, x):
        self.plan, (self.B, self.S, self.NH, _) = plan, x.shape
        self.chunks = -(-self.S // plan.L)
        self.rows = self.B, self.NH, self.chunks, plan.L

    def of_chunks(self, tiles):
        """The grid of programs that have a chunk and a tile."""
        return self.B, self.NH, self.chunks, tiles

    def __call__(self, kernel, grid, results, *arrays, warps=None):
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=[jax.ShapeDtypeStruct(*x) for x in results],
            compiler_params=plgpu.CompilerParams(num_warps=warps or self.plan.warps, num_stages=1),
            interpret=self.plan.interpreted,
            name=kernel.__name__,
        )(*arrays)


class Part:
    """What a program reads and writes of chunk c, its own but in a walk."""

    def __init__(self, launch):
        self.launch, self.plan = launch, launch.plan
        self.b, self.h, self.c, self.number = map(pl.program_id, range(4))

    def tile(self, width):
        return pl.ds(self.number * width, width)

    def zeros(self, width):
        return jnp.zeros((self.plan.L, width), jnp.float32)

    def over(self, width, slice, add, sums):
        """`sums = add(columns, sums)`, of the slices of a width."""

        def turn(number, sums):
            return add(pl.ds(number * slice, slice), sums)

        return lax.fori_loop(0, width // slice, turn, sums)

    def load(self, x, columns):
        part = self.steps(x, columns)
        if self.launch.S % self.plan.L == 0:
            return plgpu.load(part)
        return plgpu.load(part, mask=self.happens(part.shape), other=0)

    def store(self, out, columns, x):
        some = self.launch.S % self.plan.L
        mask = self.happens(x.shape) if some else None
        plgpu.store(self.steps(out, columns), x.astype(out.dtype), mask=mask)

    def steps(self, x, columns):
        return x.at[self.b, pl.ds(self.c * self.plan.L, self.plan.L), self.h, columns]

    def happens(self, shape):
        step = lax.broadcasted_iota(jnp.int32, shape, 0)
        return step < self.launch.S - self.c * self.plan.L

    def weights(self, w):
        rows = [w[self.b, self.h, self.c, x] for x in range(8)]
        return Weights(*(x[:, None] for x in rows[:6]), *(x[None] for x in rows[6:]))

    def memory(self, C, keys, values):
        return C[self.b, self.h, self.c, keys, values]

    def row(self, n, keys):
        return n[self.b, self.h, self.c, keys][None]

    def store_memory(self, C_out, n_out, c, keys, values, C, n):
        """With n, which is that of all tiles of values, from the first one."""
        C_out[self.b, self.h, *c, keys, values] = C.astype(C_out.dtype)
        self.store_once(n_out.at[self.b, self.h, *c, keys], n[0])

    def store_once(self, part, x):
        plgpu.store(part, x, mask=jnp.full(x.shape, self.number == 0))

    def store_steps(self, out, x, once=False):
        """x is (L, 1). For each tile, or what is the same in all."""
        x = jnp.sum(x, 1)
        if once:
            self.store_once(out.at[self.at_steps(out)], x)
        else:
            out[self.number, self.b, self.h, self.c] = x

    def at_steps(self, out):
        return self.b, self.h, self.c
