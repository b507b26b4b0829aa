"""The chunkwise mLSTM for torch, in plain torch: all chunks in batched products.

Mathematics and names are those of `keras_xlstm/ops/mlstm.py`. Only the states go through a loop
over the chunks. Everything is computed in float32, whatever the inputs come in.
"""

import torch

from keras_xlstm.ops.mlstm import CHUNK_SIZE, MAX_EXPONENT, NEVER


def mlstm_chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    B, S, NH, DHQK = q.shape
    L = min(chunk_size or CHUNK_SIZE, S)
    num_chunks = -(-S // L)

    def chunks(x, fill=0.0):
        """(B, S, NH, ...) -> (chunks, B, NH, L, ...), a last partial chunk filled up."""
        pad = [0, 0] * (x.ndim - 2) + [0, num_chunks * L - S]
        x = torch.nn.functional.pad(x.float(), pad, value=fill)
        return x.unflatten(1, (num_chunks, L)).movedim(1, 0).transpose(2, 3).contiguous()

    q, k, v, log_f = (chunks(x) for x in (q, k, v, log_f))
    q = q * DHQK**-0.5
    i, s = chunks(i, NEVER), chunks(s, NEVER)

    decay = _segment_sums(log_f)  # (chunks, B, NH, L, L)
    b = log_f.cumsum(-1)
    D = decay + i[..., None, :]
    m_inner = (decay + s[..., None, :]).amax(-1)

    # What each chunk adds to the state, and then the states at the chunks' starts.
    m_added = m_inner[..., -1]
    weighted = k * torch.exp(D[..., -1, :] - m_added[..., None])[..., None]
    C_added, n_added = weighted.transpose(-1, -2) @ v, weighted.sum(-2)
    C, n, m = state
    starts = []
    for C_new, n_new, m_new, g in zip(
        C_added.unbind(), n_added.unbind(), m_added.unbind(), b[..., -1].unbind(), strict=True
    ):
        starts.append((C, n, m))
        m_next = torch.maximum(g + m, m_new)
        old, new = torch.exp(g + m - m_next)[..., None], torch.exp(m_new - m_next)[..., None]
        C, n, m = old[..., None] * C + new[..., None] * C_new, old * n + new * n_new, m_next
    C_start, n_start, m_start = (torch.stack(x) for x in zip(*starts, strict=True))

    m_t = torch.maximum(b + m_start[..., None], m_inner)  # (chunks, B, NH, L)
    inner = q @ k.transpose(-1, -2) * torch.exp(D - m_t[..., None])
    outer = torch.exp(b + m_start[..., None] - m_t)
    num = inner @ v + outer[..., None] * (q @ C_start)
    nq = inner.sum(-1) + outer * (q @ n_start[..., None]).squeeze(-1)
    floor = torch.exp((-m_t).clamp(max=MAX_EXPONENT))
    h = num / (torch.maximum(nq.abs(), floor) + eps)[..., None]
    h = h.transpose(2, 3).movedim(0, 1).reshape(B, num_chunks * L, NH, -1)[:, :S]
    return h, (C, n, m)


def _segment_sums(x):
    """(..., L) -> (..., L, L): [t, j] is the sum of x over j < l <= t; NEVER where j > t."""
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).tril(-1)
    sums = torch.where(later, x[..., None], 0.0).cumsum(-2)
    return sums.masked_fill(later.T, NEVER)
