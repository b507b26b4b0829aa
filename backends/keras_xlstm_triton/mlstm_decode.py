"""One step of the mLSTM for torch on GPUs, in one launch of the kernel in `mlstm_update.py`."""

import torch
from torch import Tensor

from keras_xlstm.ops.mlstm import step as plain_step
from keras_xlstm_triton import mlstm as walks
from keras_xlstm_triton.eager_mlstm import fold_into_batch
from keras_xlstm_triton.mlstm_plan import Device, step_tiles


def step(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    """A kernel of the operation "mlstm", for S = 1."""
    with torch.autocast(q.device.type, enabled=False):
        h, C, n, m = Step.apply(eps, q, k, v, i, log_f, s.view_as(s), *state)
    return h, (C, n, m)


def why_not(q, k, v, *args, **kwargs):
    if q.shape[1] != 1:
        return f"needs S = 1, received {q.shape[1]}"
    return walks.why_not_here(q, k, v)


def how(q, k, v, *args, **kwargs):
    return "by {} keys and {} values".format(*tiles_of(q, v))


def tiles_of(q, v):
    B, _, NH, DHQK = q.shape
    return step_tiles(int(B * NH), DHQK, v.shape[-1], Device.of(q))


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, s: Tensor,
    C: Tensor, n: Tensor, m: Tensor, eps: float,
) -> list[Tensor]:  # fmt: skip
    """h, C, n and m."""
    from keras_xlstm_triton.mlstm_update import update

    q, k, v = map(walks.readable, (q, k, v))
    i, log_f, s, C, n, m = (x.contiguous() for x in (i, log_f, s, C, n, m))
    (B, _, NH, DHQK), DHHV, (ROWS, TILE) = q.shape, v.shape[-1], tiles_of(q, v)
    outputs = shapes(q, k, v, i, log_f, s, C, n, m, eps)
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 2)]
    update[(B * NH * -(-DHHV // TILE),)](
        q, k, v, *strides, i, log_f, s, C, n, m, *outputs, NH, DHQK**-0.5, eps,
        DHQK=DHQK, DHHV=DHHV, ROWS=ROWS, TILE=TILE, num_warps=4,
    )  # fmt: skip
    return outputs


def shapes(q, k, v, i, log_f, s, C, n, m, eps):
    """Tensors for what `forward` returns."""
    return [x.new_empty(x.shape) for x in (v, C, n, m)]


operator = walks.operator("mlstm_step", forward, shapes)


class Step(torch.autograd.Function):
    """h, C, n and m. Gradients are those of the plain form."""

    @staticmethod
    def forward(eps, *tensors):
        return tuple(operator(*tensors, eps))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.eps, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dh, *d_state):
        def plain(*x):
            h, state = plain_step(*(y.squeeze(1).float() for y in x[:6]), x[6:], ctx.eps)
            return h.unsqueeze(1), *state

        with torch.autocast(dh.device.type, enabled=False):
            return None, *torch.func.vjp(plain, *ctx.saved_tensors)[1]((dh.float(), *d_state))

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Step, info.batch_size, in_dims, args)
