"""The chunkwise mLSTM for torch, in plain torch, with its gradient written out.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. The sequence is walked in groups of
chunks: all chunks of a group are computed in batched products, the states at their starts too,
since a state is the weighted sum of what the chunks before it added. A group holds as many chunks
as its temporaries fit the cache: many of small heads, one of large heads. The backward pass keeps
the inputs, h, and the states at the starts of chunks; it walks the groups from the last to the
first, and computes all else again.

Three things make it short and exact:

- The normalizer is one more column of the memory: n is what C would hold of values that are 1.
- Logarithms of decays are differences of float64 prefix sums, so that small ones survive beside
  large ones. All else is float32, whatever the inputs come in.
- A stabilizer only scales, so its gradient cancels, but for eps and the last state. What is left
  flows to the step that set the maximum.
"""

import math

import torch

from keras_xlstm.ops.mlstm import MAX_EXPONENT, chunkwise

RESET = -1e6  # for NEVER in sums: float64 still resolves what it is added to
GROUP_SIZE = 2**19  # elements of the largest temporary of a group


def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    L = chunk_size or chunk_size_for(q.shape[-1], v.shape[-1])
    keep = torch.is_grad_enabled()
    s = s.view_as(s)  # where it is i itself: Dynamo wants inputs apart
    with torch.autocast(q.device.type, enabled=False):
        h, C, n, m, *_ = Chunkwise.apply(L, eps, keep, q, k, v, i, log_f, s, *state)
    return h, (C, n, m)


def chunk_size_for(DHQK, DHHV):
    return 64 if DHQK * DHHV < 2**16 else 128


class Chunkwise(torch.autograd.Function):
    """h, C, n and m; with `keep` also what the gradient needs: n q, and C at starts of chunks."""

    @staticmethod
    def forward(L, eps, keep, q, k, v, i, log_f, s, C, n, m):
        h = torch.empty((*q.shape[:3], v.shape[-1]), dtype=torch.float32, device=q.device)
        normalizers = torch.empty_like(i)
        memory, kept = with_normalizer(C, n), []
        for span, gates in spans(L, q, i, log_f, s, m):
            for group in span.groups(q, v):
                x, y, z = group.pack(q), group.pack(k), group.pack(v, ones=1)
                added = (y * gates.to_end[group.chunks]).mT @ z
                starts, memory = next_states(added, memory, gates, group)
                num = (x @ starts).mul_(gates.from_start[group.chunks])
                add_product(num, (x @ y.mT).mul_(gates.inside(group)), z)
                nq = num[..., -1:]
                group.of(normalizers)[:] = nq[..., 0]
                group.of(h)[:] = num[..., :-1].div_(gates.denominator(group, nq, eps))
                if keep:
                    kept.append(starts)
        C, n = memory[..., :-1].contiguous(), memory[..., -1].contiguous()
        return h, C, n, gates.m[..., -1].clone(), normalizers, *kept

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.L, ctx.eps, _, *inputs = inputs
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.save_for_backward(*inputs, *outputs)

    @staticmethod
    def backward(ctx, dh, dC, dn, dm, *_):
        # Compiled code is not differentiated twice, and a function in a function confuses Dynamo.
        gradient = Gradient.forward if torch.compiler.is_compiling() else Gradient.apply
        with torch.autocast(dh.device.type, enabled=False):
            gradients = gradient(ctx.L, ctx.eps, dh, dC, dn, dm, *ctx.saved_tensors)
        return None, None, None, *gradients

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Chunkwise, info.batch_size, in_dims, args)


class Gradient(torch.autograd.Function):
    """The gradients with respect to q, k, v, i, log_f, s, C, n and m."""

    @staticmethod
    def forward(L, eps, dh, dC, dn, dm, q, k, v, i, log_f, s, C, n, m, h, C_end, n_end, _, *kept):
        normalizers, *kept = kept
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        di, dlog_f, dm_t, m_t = (torch.empty_like(i, dtype=torch.float64) for _ in range(4))
        later = with_normalizer(dC, dn)  # the gradient of the state at a group's end
        for span, gates in reversed(spans(L, q, i, log_f, s, m)):
            span.of(m_t)[:] = gates.m_t
            for group in reversed(span.groups(q, v)):
                *kept, starts = kept
                x, y, z = group.pack(q), group.pack(k), group.pack(v, ones=1)
                nq = group.of(normalizers)[..., None]
                P, to_end = gates.inside(group), gates.to_end[group.chunks]

                # h = num / (max(|nq|, exp(-m)) + eps)
                d_num = group.pack(dh, ones=1)
                d_num[..., :-1] /= gates.denominator(group, nq, eps)
                along = (d_num[..., :-1] * group.of(h)).sum(-1, keepdim=True)
                rules = nq.abs() > gates.floor[group.chunks]
                d_num[..., -1:] = -along * nq.sign() * rules
                group.of(dm_t)[:] = -eps * along[..., 0]

                # num = (P * q k^T) z + from_start * q C
                inner = (x @ y.mT).mul_(P)
                d_inner = d_num @ z.mT
                dz = inner.mT @ d_num
                d_inside = inner.mul_(d_inner)  # of logarithms, as all of these
                d_qk = d_inner.mul_(P)
                d_num *= gates.from_start[group.chunks]
                dx = d_num @ starts.mT
                d_from_start = (dx * x).sum(-1)
                add_product(dx, d_qk, y)
                dy = d_qk.mT @ x

                # C' = between * C + (to_end * k) z^T
                d_ends, later, d_between = earlier_states(x.mT @ d_num, later, starts, gates, group)
                dy_end = (z @ d_ends.mT).mul_(to_end)
                d_to_end = (dy_end * y).sum(-1)
                add_product(dz, y.mul_(to_end), d_ends)

                group.of(dq)[:] = dx
                group.of(dk)[:] = dy.add_(dy_end)
                group.of(dv)[:] = dz[..., :-1]
                group.of(di)[:] = d_inside.sum(-2) + d_to_end
                group.of(dlog_f)[:] = through_decays(d_inside, d_from_start, d_to_end, d_between)

        dm = dm - (dC * C_end).sum((-1, -2)) - (dn * n_end).sum(-1)
        ds, more_log_f, dm = to_the_maximum(dm_t, dm, m_t, log_f, s, m)
        dC, dn = later[..., :-1], later[..., -1]
        dm = dm + (dC * C).sum((-1, -2)) + (dn * n).sum(-1)
        dlog_f += more_log_f
        gates = (x.to(i.dtype) for x in (di, dlog_f, ds))
        return dq, dk, dv, *gates, dC.contiguous(), dn.contiguous(), dm.to(m.dtype)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.L, ctx.eps, *tensors = inputs
        ctx.save_for_backward(*tensors[:13])

    @staticmethod
    def backward(ctx, *gradients):
        """The gradient's own, which torch derives from the same chunks in `keras.ops`."""

        def outputs(*inputs):
            h, state = chunkwise(*inputs[:6], inputs[6:], chunk_size=ctx.L, eps=ctx.eps)
            return h, *state

        def gradient(*tensors):
            return torch.func.vjp(outputs, *tensors[4:])[1](tensors[:4])

        with torch.autocast(gradients[0].device.type, enabled=False):
            second = torch.func.vjp(gradient, *ctx.saved_tensors)[1](gradients)
        constants = len(ctx.needs_input_grad) - 2 - len(second)
        return None, None, *second, *[None] * constants

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Gradient, info.batch_size, in_dims, args)


class Span:
    """Chunks of L steps each, from step `start` on; a group of them, from chunk `first` on."""

    def __init__(self, start, count, L, first=0):
        self.start, self.count, self.L = start, count, L
        self.first, self.chunks = first, (slice(None), slice(None), slice(first, first + count))

    def of(self, x):
        """A view of these steps: (B, S, NH, ...) -> (B, NH, chunks, L, ...)."""
        x = x[:, self.start : self.start + self.count * self.L]
        return x.unflatten(1, (self.count, self.L)).movedim(3, 1)

    def pack(self, x, ones=0):
        """A copy in float32 for matrix products, with columns of ones."""
        x = self.of(x)
        width = x.shape[-1]
        packed = x.new_empty((*x.shape[:-1], width + ones), dtype=torch.float32)
        packed[..., :width] = x
        packed[..., width:] = 1
        return packed

    def groups(self, q, v):
        L, (B, _, NH, DHQK), DHHV = self.L, q.shape, v.shape[-1]
        G = max(GROUP_SIZE // (B * NH * max(L * L, L * DHHV, DHQK * DHHV)), 1)
        starts = range(0, self.count, G)
        return [Span(self.start + c * L, min(G, self.count - c), L, c) for c in starts]


def spans(L, q, i, log_f, s, m):
    """All whole chunks, and the rest as a chunk of its own, with their gates."""
    count, rest = divmod(q.shape[1], L)
    found = []
    for span in (Span(0, count, L), Span(count * L, 1, rest)):
        if span.count * span.L:
            gates = Gates(q.shape[-1], *(span.of(x).double() for x in (i, log_f, s)), m)
            found.append((span, gates))
            m = gates.m[..., -1]
    return found


class Gates:
    """What the gates of a span weigh. Logarithms in float64, (B, NH, chunks, L); weights, with an
    axis more, in float32."""

    def __init__(self, DHQK, i, log_f, s, start_m):
        b = log_f.clamp(min=RESET).cumsum(-1)
        offered = (s - b).cummax(-1).values
        # At the ends of chunks, and before the first: the stabilizer, and the sum of log_f.
        g = torch.nn.functional.pad(b[..., -1].cumsum(-1), (1, 0))
        offers = torch.cat([start_m[..., None], offered[..., -1] - g[..., :-1]], -1)
        m = (g + offers.cummax(-1).values).float()
        m[..., 0] = start_m
        self.m, self.m_t = m, (b + torch.maximum(offered, m[..., :-1, None])).float()
        self.floor = torch.exp((-self.m_t).clamp(max=MAX_EXPONENT))[..., None]

        # At step t: of step j of the chunk, exp(row_t + column_j), and of the chunk's start.
        self.row, self.column = b - self.m_t - 0.5 * math.log(DHQK), i - b
        self.from_start = (self.row + m[..., :-1, None]).float().exp_()[..., None]
        # At the chunk's end: of step j, and of its start.
        self.to_end = (self.column + (b[..., -1:] - m[..., 1:, None])).float().exp_()[..., None]
        self.ends = g - m
        self.over_chunk = self.ends.diff(dim=-1).float().exp_()

    def inside(self, group):
        row, column = self.row[group.chunks], self.column[group.chunks]
        return (row[..., :, None] + column[..., None, :]).float().exp_().tril_()

    def denominator(self, group, nq, eps):
        return torch.maximum(nq.abs(), self.floor[group.chunks]).add_(eps)

    def between(self, group):
        """Of the state at each end of a chunk at the later ones, (B, NH, count + 1, count + 1)."""
        ends = self.ends[..., group.first : group.first + group.count + 1]
        return (ends[..., :, None] - ends[..., None, :]).float().exp_().tril_()


def through_decays(d_inside, d_from_start, d_to_end, d_between):
    """The gradient of log_f, from those of the logarithms of all weights.

    A gate at l is part of what lies between j < l and t >= l. The sums hold no other terms: those
    would cancel, but leave their rounding errors.
    """
    L = d_inside.shape[-1]
    before = torch.ones(L, L, device=d_inside.device).triu_(1)  # [j, l]: j < l
    passing = (d_inside @ before).add_(d_from_start[..., None]).tril_().sum(-2)
    return passing + (d_to_end.cumsum(-1) - d_to_end) + d_between[..., None]


def next_states(added, memory, gates, group):
    """The states at the starts of the chunks, (B, NH, G, DHQK, DHHV + 1), and after the last."""
    if group.count == 1:
        old = gates.over_chunk[group.chunks][..., None]
        return memory[:, :, None], added[:, :, 0].addcmul_(old, memory)
    states = torch.cat([memory[:, :, None], added], dim=2)
    states = (gates.between(group) @ states.flatten(3)).view(states.shape)
    return states[:, :, :-1], states[:, :, -1]


def earlier_states(d_starts, later, starts, gates, group):
    """The gradients of states at the ends of chunks, at the group's start, and of `over_chunk`."""
    over_chunk = gates.over_chunk[group.chunks]
    if group.count == 1:
        ends, earlier = later[:, :, None], d_starts[:, :, 0].addcmul_(over_chunk[..., None], later)
    else:
        states = torch.cat([d_starts, later[:, :, None]], dim=2)
        states = (gates.between(group).mT @ states.flatten(3)).view(states.shape)
        ends, earlier = states[:, :, 1:], states[:, :, 0]
    return ends, earlier, over_chunk * (ends * starts).sum((-1, -2))


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


def with_normalizer(C, n):
    return torch.cat([C, n[..., None]], dim=-1).float()


def add_product(out, a, b):
    out.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))


def fold_into_batch(function, size, in_dims, args):
    """`torch.vmap` of a function whose tensors begin with the batch axis: a longer batch."""

    def fold(x, dim):
        if not isinstance(x, torch.Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    outputs = function.apply(*map(fold, args, in_dims))
    return tuple(x.unflatten(0, (size, -1)) for x in outputs), (0,) * len(outputs)
