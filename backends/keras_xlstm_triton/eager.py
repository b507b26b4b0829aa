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
- A stabilizer only scales, so what depends on it cancels, but for eps and the last state. What is
  left flows to the step that set the maximum.
"""

import itertools

import torch
from torch.autograd.function import once_differentiable

from keras_xlstm.ops.mlstm import MAX_EXPONENT, chunkwise

RESET = -1e6  # for NEVER in sums: float64 still resolves what it is added to
GROUP_SIZE = 2**19  # elements of the largest temporary of a group


def chunk_size_for(DHQK, DHHV):
    return 64 if DHQK * DHHV < 2**16 else 128


def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    L = chunk_size or chunk_size_for(q.shape[-1], v.shape[-1])
    inputs = (q, k, v, i, log_f, s, *state)
    h, C, n, m, *_ = Chunkwise.apply(min(L, q.shape[1]), eps, torch.is_grad_enabled(), *inputs)
    return h, (C, n, m)


class PerRow(torch.autograd.Function):
    """A function of tensors whose first axis is the batch: `torch.vmap` makes it a longer one."""

    generate_vmap_rule = False

    @classmethod
    def vmap(cls, info, in_dims, *args):
        def fold(x, dim):
            if not isinstance(x, torch.Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        outputs = cls.apply(*map(fold, args, in_dims))
        unfolded = tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs)
        return unfolded, (0,) * len(unfolded)


class Chunkwise(PerRow):
    """h, C, n and m, and with `keep` what the gradient needs."""

    @staticmethod
    def forward(L, eps, keep, q, k, v, i, log_f, s, C, n, m):
        B, S, NH, DHQK = q.shape
        DHHV = v.shape[-1]
        h = torch.empty((B, S, NH, DHHV), dtype=torch.float32, device=q.device)
        memory, m = with_normalizer(C, n), m.flatten()
        kept = []
        for group in groups(q, v, L):
            start, start_m = memory, m
            gates = Gates(*(group.take(x) for x in (i, log_f, s)), start_m)
            m = gates.m[:, -1]
            x, y, z = group.take(q) * DHQK**-0.5, group.take(k), with_ones(group.take(v))
            starts, memory = next_states((y * gates.at_end[..., None]).mT @ z, start, gates)
            num = torch.mul(x @ starts, gates.outer[..., None])
            num = add_product(num, (x @ y.mT).mul_(gates.inner()), z)
            nq, m_t = num[..., -1], gates.m_t
            torch.div(num[..., :-1], denominator(nq, m_t, eps)[..., None], out=group.put(h))
            if keep:
                kept.append((nq, m_t, start_m, starts))
        C, n = (x.unflatten(0, (B, NH)) for x in (memory[..., :-1], memory[..., -1]))
        kept = [x.clone() for x in itertools.chain(*kept)]
        return h, C.contiguous(), n.contiguous(), m.reshape(B, NH), *kept
