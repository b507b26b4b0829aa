"""The chunkwise mLSTM for torch, in plain torch, with its gradient written out.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. The sequence is walked in groups of
chunks: products are of all chunks of a group, and only the states go from chunk to chunk. A group
holds as many chunks as its temporaries fit the cache: many of small heads, one of large heads. The
backward pass keeps the inputs, h, what the gates weigh, and the states that groups start from; it
walks the groups from the last to the first, and computes all else again.

Three things make it short and exact:

- The normalizer is one more column of the memory: n is what C would hold of values that are 1.
- Logarithms of decays are differences of prefix sums in float64, so that small ones survive beside
  large ones; `weigh` says how float32 keeps that. All else is float32, whatever the inputs come in.
- A stabilizer only scales, so its gradient cancels, but for eps and the last state. What is left
  flows to the step that set the maximum.
"""

import math

import torch

from keras_xlstm.ops.mlstm import MAX_EXPONENT, chunkwise
from keras_xlstm_triton.products import by_onednn

SHUT = -1e5  # for NEVER in sums: what it is added to is still resolved
GROUP_SIZE = 2**17  # elements of the largest temporary of a group


def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    L = chunk_size or chunk_size_for(q, v)
    keep = torch.is_grad_enabled()
    s = s.view_as(s)  # where it is i itself: Dynamo wants inputs apart
    with torch.autocast(q.device.type, enabled=False), by_onednn():
        h, C, n, m, *_ = Chunkwise.apply(L, eps, keep, q, k, v, i, log_f, s, *state)
    return h, (C, n, m)


def how(q, k, v, *args, chunk_size, **kwargs):
    return f"in chunks of {min(chunk_size or chunk_size_for(q, v), q.shape[1])} steps"


def chunk_size_for(q, v):
    return 64 if q.shape[-1] * v.shape[-1] < 2**14 else 128


class Chunkwise(torch.autograd.Function):
    """h, C, n and m; with `keep` also what the gradient needs: of each span the states that groups
    of chunks start from, n q, and what the gates weigh."""

    @staticmethod
    def forward(L, eps, keep, q, k, v, i, log_f, s, C, n, m):
        h = torch.empty((*q.shape[:3], v.shape[-1]), dtype=torch.float32, device=q.device)
        state, kept = with_normalizer(C, n), []
        for span in spans(L, q):
            Q, K, V, H = map(span.of, (q, k, v, h))
            weights, m = weigh(q.shape[-1], eps, *map(span.of, (i, log_f, s)), m)
            gates, normalizers = Gates(weights), torch.empty_like(weights[:, 0, :, None])
            for chunks, rows in span.groups(q, v):
                if keep:
                    kept.append(state)
                x, y = pack(Q[chunks]), pack(K[chunks], gates.k_factor[rows])
                z = pack(V[chunks], ones=1)
                added = torch.bmm((y * gates.to_end[rows]).mT, z)
                starts, state = chain(state, added, gates.over_chunk[rows])
                num = torch.bmm(x * gates.from_start[rows], starts)
                num.baddbmm_(torch.bmm(x, y.mT).mul_(gates.inside(rows)), z)
                normalizers[rows] = nq = num[..., -1:]
                unpack(num[..., :-1], H[chunks], 1 / gates.denominator(nq, rows))
            if keep:
                kept += normalizers, weights
        C, n = (x.unflatten(0, C.shape[:2]) for x in (state[..., :-1], state[..., -1]))
        return h, C.contiguous(), n.contiguous(), m.clone(), *kept

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.L, ctx.eps, _, *inputs = inputs
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.set_materialize_grads(False)  # zeros for all that is kept
        ctx.save_for_backward(*inputs, *outputs)

    @staticmethod
    def backward(ctx, *d_outputs):
        with by_onednn():
            gradients = first_gradients(Gradient, (ctx.L, ctx.eps), d_outputs, ctx.saved_tensors)
        return None, None, None, *gradients

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Chunkwise, info.batch_size, in_dims, args)


class Gradient(torch.autograd.Function):
    """The gradients with respect to q, k, v, i, log_f, s, C, n and m."""

    @staticmethod
    def forward(L, eps, dh, dC, dn, dm, q, k, v, i, log_f, s, C, n, m, h, C_end, n_end, _, *kept):
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        di, dlog_f, dm_t, m_t = (torch.empty_like(i, dtype=torch.float64) for _ in range(4))
        later = with_normalizer(dC, dn)  # the gradient of the state at a group's end
        for span in reversed(spans(L, q)):
            Q, K, V, H, dH = map(span.of, (q, k, v, h, dh))
            dQ, dK, dV = map(span.of, (dq, dk, dv))
            *kept, nq, weights = kept
            gates = Gates(weights)
            per_unit = 1 / gates.denominator(nq)
            toward_nq = -nq.sign() * (nq.abs() > gates.floor)
            sums = weights.new_empty(6, *nq.shape[:2])
            for chunks, rows in reversed(span.groups(q, v)):
                *kept, starts = kept
                x, y = pack(Q[chunks]), pack(K[chunks], gates.k_factor[rows])
                z, P = pack(V[chunks], ones=1), gates.inside(rows)
                from_start, to_end = gates.from_start[rows], gates.to_end[rows]
                x_start, y_end, over_chunk = x * from_start, y * to_end, gates.over_chunk[rows]
                if len(starts) < len(x):
                    starts, _ = chain(starts, torch.bmm(y_end.mT, z), over_chunk)

                # h = num / (max(|nq|, exp(-m)) + eps)
                d_num = pack(dH[chunks], per_unit[rows], ones=1)
                along = pack((dH[chunks] * H[chunks]).sum(-1, keepdim=True)) * per_unit[rows]
                d_num[..., -1:] = along * toward_nq[rows]

                # num = (P * q k^T) z + from_start * q C
                inside = torch.bmm(x, y.mT).mul_(P)
                d_inner = torch.bmm(d_num, z.mT)
                dz = torch.bmm(inside.mT, d_num)
                d_inside = inside.mul_(d_inner)  # of logarithms, as all of these
                d_qk = d_inner.mul_(P)
                dx_start = torch.bmm(d_num, starts.mT)
                d_from_start = (dx_start * x_start).sum(-1)
                dx = dx_start.mul_(from_start).baddbmm_(d_qk, y)
                dy = torch.bmm(d_qk.mT, x)

                # C' = over_chunk * C + (to_end * k) z^T
                d_starts = torch.bmm(x_start.mT, d_num)
                ends, later = chain(later, d_starts, over_chunk, reverse=True)
                d_over_chunk = (ends * starts).sum((-1, -2), keepdim=True).mul_(over_chunk)
                dy_end = torch.bmm(z, ends.mT)
                d_to_end = (dy_end * y_end).sum(-1)
                dy.addcmul_(dy_end, to_end)
                dz.baddbmm_(y_end, ends)

                unpack(dx, dQ[chunks])
                unpack(dy, dK[chunks], gates.k_factor[rows])
                unpack(dz[..., :-1], dV[chunks])
                parts = (
                    along[..., 0],
                    d_inside.sum(-2),
                    through_decays(d_inside),
                    d_from_start,
                    d_to_end,
                    d_over_chunk[..., 0].expand_as(d_to_end),
                )
                sums[:, rows] = torch.stack(parts)

            along, column, inside, from_start, to_end, over_chunk = sums.double()
            from_start = from_start.flip(-1).cumsum(-1).flip(-1)
            before = to_end.cumsum(-1) - to_end
            unpack(-gates.eps[..., 0] * along, span.of(dm_t))
            unpack(gates.m_t[..., 0], span.of(m_t))
            unpack(column + to_end, span.of(di))
            unpack(inside + from_start + before + over_chunk, span.of(dlog_f))

        later = later.unflatten(0, C.shape[:2])
        dm = dm - inner(dC, C_end) - inner(dn, n_end)
        ds, more_log_f, dm = to_the_maximum(dm_t, dm, m_t, log_f, s, m)
        dC, dn = later[..., :-1], later[..., -1]
        dm = dm + inner(dC, C) + inner(dn, n)
        dlog_f += more_log_f
        gates = (x.to(i.dtype) for x in (di, dlog_f, ds))
        return dq, dk, dv, *gates, dC.contiguous(), dn.contiguous(), dm.to(m.dtype)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.L, ctx.eps, *tensors = inputs
        ctx.save_for_backward(*tensors[:13])

    @staticmethod
    def backward(ctx, *gradients):
        second = second_gradients(ctx.L, ctx.eps, ctx.saved_tensors, gradients)
        constants = len(ctx.needs_input_grad) - 2 - len(second)
        return None, None, *second, *[None] * constants

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Gradient, info.batch_size, in_dims, args)


def first_gradients(function, options, d_outputs, saved):
    """Of an autograd function; `saved` are the nine inputs, then h, C, n, m and what was kept."""
    d_outputs = [
        torch.zeros_like(x) if dx is None else dx
        for x, dx in zip(saved[9:13], d_outputs[:4], strict=True)
    ]
    # Compiled code is not differentiated twice, and a function in a function confuses Dynamo.
    gradient = function.forward if torch.compiler.is_compiling() else function.apply
    with torch.autocast(saved[0].device.type, enabled=False):
        return gradient(*options, *d_outputs, *saved)


def second_gradients(L, eps, tensors, gradients):
    """The gradient's own, which torch derives from the same chunks in `keras.ops`.

    `tensors` are the gradients of h, C, n and m, and the inputs.
    """

    def outputs(*inputs):
        h, state = chunkwise(*inputs[:6], inputs[6:], chunk_size=L, eps=eps)
        return h, *state

    def gradient(*tensors):
        return torch.func.vjp(outputs, *tensors[4:])[1](tensors[:4])

    with torch.autocast(gradients[0].device.type, enabled=False):
        return torch.func.vjp(gradient, *tensors)[1](gradients)


class Span:
    """Chunks of L steps each, from step `start` on."""

    def __init__(self, start, count, L):
        self.start, self.count, self.L = start, count, L

    def of(self, x):
        """A view of these steps: (B, S, NH, ...) -> (chunks, B, NH, L, ...)."""
        x = x[:, self.start : self.start + self.count * self.L]
        return x.unflatten(1, (self.count, self.L)).movedim((1, 0, 3), (0, 1, 2))

    def groups(self, q, v):
        """Pairs of slices: of chunks, and of the rows that they are where heads are unfolded."""
        L, (B, _, NH, DHQK), DHHV = self.L, q.shape, v.shape[-1]
        G = max(GROUP_SIZE // (B * NH * max(L * L, L * DHHV, DHQK * DHHV)), 1)
        bounds = [(c, min(c + G, self.count)) for c in range(0, self.count, G)]
        return [(slice(a, z), slice(a * B * NH, z * B * NH)) for a, z in bounds]


def spans(L, q):
    """All whole chunks, and the rest as a chunk of its own."""
    count, rest = divmod(q.shape[1], L)
    found = Span(0, count, L), Span(count * L, 1, rest)
    return [span for span in found if span.count * span.L]


def pack(x, factor=None, ones=0):
    """(chunks, B, NH, L, ...) -> (rows, L, ...) in float32, for products; with columns of ones."""
    if factor is None and not ones:
        return x.flatten(0, 2).float()
    width = x.shape[-1]
    packed = x.new_empty((*x.shape[:-1], width + ones), dtype=torch.float32)
    packed[..., width:] = 1
    multiply(x, factor, packed[..., :width])
    return packed.flatten(0, 2)


def unpack(x, into, factor=None):
    """The way back of `pack`."""
    multiply(x.unflatten(0, into.shape[:3]), factor, into)


def multiply(x, factor, out):
    if factor is None:
        out.copy_(x)
        return
    factor = factor.unflatten(0, x.shape[:3])
    if torch.compiler.is_compiling():
        out.copy_(x * factor)  # Dynamo refuses an `out` that is not contiguous
    else:
        torch.mul(x, factor, out=out)


def weigh(DHQK, eps, i, log_f, s, start_m):
    """What gates (chunks, B, NH, L) weigh, for `Gates`, and the last stabilizer."""
    i, log_f, s = (x.contiguous().double() for x in (i, log_f, s))
    b = log_f.clamp(min=SHUT).cumsum(-1)
    offered = (s - b).cummax(-1).values
    # At the ends of chunks, and before the first: the stabilizer, and the sum of log_f.
    g = torch.nn.functional.pad(b[..., -1].cumsum(0), (0, 0, 0, 0, 1, 0))
    offers = torch.cat([start_m[None], offered[..., -1] - g[:-1]])
    m = (g + offers.cummax(0).values).float()
    m[0] = start_m
    start, end = m[:-1, ..., None].double(), m[1:, ..., None].double()
    m_t = b + torch.maximum(offered, start)

    # Large terms of rows and columns cancel exactly. What they lose in float32 is a factor of k_j,
    # and for t a change of the stabilizer, which scales all but what is added to it.
    exact_row, exact_column = b - m_t - 0.5 * math.log(DHQK), i.clamp(min=SHUT) - b
    row, column = exact_row.float(), exact_column.float()
    lost = exact_row - row
    over_chunk = (b[..., -1:] + start - end).expand_as(b)
    to_end = column + b[..., -1:] - end
    logarithms = row + start, to_end, over_chunk, -m_t - lost, -lost, exact_column - column
    weights = torch.stack([row, column, m_t, *logarithms], -2).float()
    weights[..., 3:, :].clamp_(max=MAX_EXPONENT).exp_()
    weights[..., 7, :] *= eps
    return weights.flatten(0, 2), m[-1]


class Gates:
    """What the gates of a span weigh: views (rows, L, 1) of the (rows, 9, L) of `weigh`.

    At step t: of step j of the chunk, exp(row_t + column_j), and of the chunk's start. At the
    chunk's end: of step j, and of its start.
    """

    def __init__(self, weights):
        self.row, self.column, self.m_t, *weights = weights[..., None].unbind(1)
        self.from_start, self.to_end, over_chunk, self.floor, self.eps, self.k_factor = weights
        self.over_chunk = over_chunk[:, :1]

    def inside(self, rows):
        return (self.row[rows] + self.column[rows].mT).exp_().tril_()

    def denominator(self, nq, rows=slice(None)):
        return torch.maximum(nq.abs(), self.floor[rows]).add_(self.eps[rows])


def through_decays(d_inside):
    """The gradient of log_f, from those of the logarithms of what is inside chunks.

    A gate at l is part of what lies between j < l and t >= l. The sums hold no other terms: those
    would cancel, but leave their rounding errors.
    """
    L = d_inside.shape[-1]
    before = torch.ones(L, L, device=d_inside.device).triu_(1)  # [j, l]: j < l
    return (d_inside @ before).tril_().sum(-2)


def chain(state, added, weights, reverse=False):
    """Of states that are `weight * state before + added`, those before each, and the last."""
    before, heads = [], len(state)
    pairs = list(zip(added.split(heads), weights.split(heads), strict=True))
    for new, weight in reversed(pairs) if reverse else pairs:
        before.append(state)
        state = torch.addcmul(new, weight, state)
    return torch.cat(before[::-1] if reverse else before) if len(before) > 1 else before[0], state


def to_the_maximum(dm_t, dm_end, m_t, log_f, s, m):
    """Hands gradients of the stabilizers, (B, S, NH), to the step that set each maximum.

    m_t is s_t, or else log_f_t + m_(t-1), and so on back.
    """
    dm_t[:, -1] += dm_end
    before = torch.cat([m[:, None].double(), m_t[:, :-1]], dim=1)
    offered = s >= log_f + before
    steps = torch.arange(s.shape[1], device=s.device)[:, None]
    next_offer = torch.where(offered, steps, s.shape[1]).flip(1).cummin(1).values.flip(1)
    next_offer = torch.nn.functional.pad(next_offer[:, 1:], (0, 0, 0, 1), value=s.shape[1])
    sums = dm_t.flip(1).cumsum(1).flip(1)
    beyond = torch.nn.functional.pad(sums, (0, 0, 0, 1)).gather(1, next_offer)
    total = sums - beyond
    zero = total.new_zeros(())
    ds, back = torch.where(offered, total, zero), torch.where(offered, zero, total)
    return ds, back, back[:, 0]


def inner(x, y):
    """Of each head: (B, NH, ...) -> (B, NH)."""
    return (x.double() * y).flatten(2).sum(-1)


def with_normalizer(C, n):
    return torch.cat([C, n[..., None]], dim=-1).flatten(0, 1).float()


def fold_into_batch(function, size, in_dims, args):
    """`torch.vmap` of a function whose tensors begin with the batch axis: a longer batch."""

    def fold(x, dim):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = function.apply(*map(fold, args, in_dims))
    return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0,) * len(outputs)
