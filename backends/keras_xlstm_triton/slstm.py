"""The sLSTM for torch on GPUs: launches the kernels of `slstm_scan.py`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from keras_xlstm.ops.mlstm import NEVER
from keras_xlstm_triton.eager_slstm import first_gradients, one_by_one, second_gradients
from keras_xlstm_triton.mlstm import operator, readable, why_not_multiplied


def slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale, *, on_chip=None):
    """A kernel of the operation "slstm"; `on_chip` as `plan` would choose it."""
    with torch.autocast(gates.device.type, enabled=False):
        inputs = gates, recurrent_kernel, bias, *state, recurrent_scale
        h, *state, _ = Steps.apply(on_chip, mask, reset, *inputs)
    return h, tuple(state)


def why_not(gates, *args, **kwargs):
    return why_not_multiplied(gates)


def how(gates, *args, **kwargs):
    shared = shared_memory(gates)
    ahead, back = (plan(gates.dtype, gates.shape[-1], back, shared) for back in (False, True))
    also = "" if str(ahead) == str(back) else f", and backward {back}"
    return f"with recurrent weights {ahead}{also}"


@dataclass(frozen=True)
class Plan:
    """The sizes of `slstm_scan.py`, and the warps of a program."""

    on_chip: bool
    tile: int
    slice: int
    stages: int
    warps: int

    def __str__(self):
        return "kept on chip" if self.on_chip else f"read each step, by {self.tile} columns"


ROWS = 16  # of the batch in a program: the fewest that tensor cores multiply
H100 = 227 * 1024


def shared_memory(x):
    """Bytes for a program where products read their operands there; AMD's want registers: none."""
    if x.device.type != "cuda":
        return H100  # interpreted
    if torch.version.hip is not None:
        return 0
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin


def plan(dtype, DH, back, shared, on_chip=None):
    """The sizes for a call. `on_chip` leaves it open whether R stays on chip."""
    dot, precision = operands(dtype, back)
    width, size = max(1 << (DH - 1).bit_length(), 16), dot.itemsize
    # Beside R, what changes its layout, and with two stages the next step's loads.
    free, one = shared - 4 * width * width * size, ROWS * width * 4
    if free >= one if on_chip is None else on_chip:
        stages, warps = 2 if free >= 9 * one else 1, width // (4 if precision == "ieee" else 8)
        return Plan(True, width, 16, stages, warps)
    # Forward, the slices of four gates are read at a time, which takes as many bytes.
    slice = min(width, (256 if back else 64) // size)
    return Plan(False, min(width, 64), slice, 4 if shared else 2, 8 if shared else 4)


def operands(dtype, back):
    """The dtype and the precision of products.

    h and R are about 1, and h R is added to gates, which the same rounding has changed more.
    Gradients may be too large or too small for float16: beside it they are float32, and tensor
    cores multiply them as tf32, which holds float16 exactly.
    """
    if dtype == torch.float32:
        return dtype, "ieee"
    return (torch.float32 if back and dtype == torch.float16 else dtype), "tf32"


# Launches


def launch(kernel, R, scale, mask, reset, states, dtype, on_chip, **tensors):
    from triton import language as tl

    (_, B, steps, NH, DH), back = states.shape, "raw" in tensors
    dot, precision = operands(dtype, back)
    sizes = plan(dtype, DH, back, shared_memory(states), on_chip)
    happens, cleared = (
        states if x is None else x.contiguous().view(torch.int8) for x in (mask, reset)
    )
    kernel[(NH * -(-B // ROWS),)](
        R=R.to(dot), scale=states if scale is None else scale, happens=happens, cleared=cleared,
        states=states, KIND=states.stride(0), B=B, S=steps - 1, NH=NH, DH=DH, **tensors,
        ROWS=ROWS, TILE=sizes.tile, SLICE=sizes.slice, STAGES=sizes.stages,
        ON_CHIP=sizes.on_chip, MASK=mask is not None, RESET=reset is not None,
        SCALE=scale is not None, DOT=getattr(tl, str(dot).split(".")[1]), PRECISION=precision,
        num_warps=sizes.warps, num_stages=1,
    )  # fmt: skip


def forward(
    gates: Tensor, kernel: Tensor, bias: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor,
    scale: Tensor | None, mask: Tensor | None, reset: Tensor | None, on_chip: bool | None,
) -> Tensor:  # fmt: skip
    """(4, B, S + 1, NH, DH): h, c, n, m, those before step t at t, those after the last at S."""
    from keras_xlstm_triton.slstm_scan import forward

    states = new_states(gates)
    for x, start in zip(states[:, :, 0], (h, c, n, m), strict=True):
        x.copy_(start)
    states[3, :, 0].masked_fill_(n == 0, NEVER)
    names = "gates_batch", "gates_step", "gates_gate", "gates_head"
    strides = dict(zip(names, gates.stride(), strict=False))
    tensors = {"gates": gates, "bias": bias} | strides
    launch(forward, kernel, scale, mask, reset, states, gates.dtype, on_chip, **tensors)
    return states


def new_states(gates):
    B, S, _, NH, DH = gates.shape
    return gates.new_empty((4, B, S + 1, NH, DH), dtype=torch.float32)


def backward(
    dh: Tensor, d_state: Tensor, gates: Tensor, kernel: Tensor, bias: Tensor,
    scale: Tensor | None, mask: Tensor | None, reset: Tensor | None, states: Tensor,
    on_chip: bool | None,
) -> list[Tensor]:  # fmt: skip
    """The gradients of gates, kernel, bias, the state (4, B, NH, DH), and scale if given.

    A stabilizer only scales, so its gradient cancels, but for that of the last state: `d_state` is
    what is left of it, and so is that of the first.
    """
    from keras_xlstm_triton.slstm_scan import backward

    (B, S, _, NH, DH), d_state = gates.shape, d_state.clone()
    # What was multiplied in the forward loop, heads first, (NH, B S, DH) and (NH, DH, 4 DH).
    h = states[0, :, :-1]
    if reset is not None:
        h = h.masked_fill(reset[:, :, None, None], 0)
    x = h if scale is None else h * scale[:, None]
    x = x.permute(2, 0, 1, 3).flatten(1, 2)
    dot, _ = operands(gates.dtype, False)
    x, R = x.to(dot).float(), kernel.flatten(2).to(dot).float()

    raw = x.new_empty(NH, B, S, 4, DH)
    torch.add(gates.permute(3, 0, 1, 2, 4), bias.transpose(0, 1)[:, None, None], out=raw)
    flat = raw.view(NH, B * S, 4 * DH).baddbmm_(x, R)
    strides = dict(zip(("dh_batch", "dh_step", "dh_head"), dh.stride(), strict=False))
    tensors = {"raw": raw, "dh_out": dh, "d_state": d_state} | strides
    launch(backward, kernel, scale, mask, reset, states, gates.dtype, on_chip, **tensors)
    d_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    d_gates.permute(3, 0, 1, 2, 4).copy_(raw)
    d_kernel, d_bias = (x.mT @ flat).view_as(kernel), raw.sum((1, 2)).transpose(0, 1).contiguous()
    gradients = [d_gates, d_kernel, d_bias, d_state]
    if scale is not None:
        d_x = (flat @ R.mT).view(NH, B, S, DH).permute(1, 2, 0, 3)
        gradients.append((d_x * h).sum(1))
    return gradients


def backward_shapes(dh, d_state, gates, kernel, bias, scale, *rest):
    given = gates, kernel, bias, d_state, *(() if scale is None else (scale,))
    return [x.new_empty(x.shape) for x in given]


forward_operator = operator("slstm_forward", forward, lambda gates, *rest: new_states(gates))
backward_operator = operator("slstm_backward", backward, backward_shapes)

# Autograd


class Steps(torch.autograd.Function):
    """h, the state (h, c, n, m), and all states, which the gradient needs."""

    @staticmethod
    def forward(on_chip, mask, reset, gates, kernel, bias, h, c, n, m, scale):
        tensors = readable(gates), *map(contiguous, (kernel, bias, h, c, n, m, scale))
        states = forward_operator(*tensors, mask, reset, on_chip)
        end = [x.clone() for x in states[:, :, -1]]
        end[3] = torch.where(end[2] == 0, m, end[3])
        return states[0, :, 1:].clone(memory_format=torch.contiguous_format), *end, states

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.on_chip, states = inputs[0], outputs[5]
        ctx.mark_non_differentiable(states)
        ctx.set_materialize_grads(False)  # zeros for all states
        ctx.save_for_backward(*inputs[1:], states)

    @staticmethod
    def backward(ctx, *d_outputs):
        gradients = first_gradients(Gradient, (ctx.on_chip,), d_outputs, ctx.saved_tensors)
        return None, None, None, *gradients

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Steps, info.batch_size, in_dims, args)


class Gradient(torch.autograd.Function):
    """The gradients with respect to gates, recurrent_kernel, bias, h, c, n, m and scale."""

    @staticmethod
    def forward(
        on_chip, dh_out, dh, dc, dn, dm, mask, reset, gates, kernel, bias, h, c, n, m, scale, states
    ):
        (_, c_start, n_start, _), (_, c_end, n_end, _) = states[:, :, 0], states[:, :, -1]
        d_end = torch.stack([dh, dc, dn, dm - dc * c_end - dn * n_end])
        tensors = readable(gates), *map(contiguous, (kernel, bias, scale)), mask, reset, states
        gradients = backward_operator(readable(dh_out), d_end, *tensors, on_chip)
        d_gates, d_kernel, d_bias, d_start, *d_scale = gradients
        dh, dc, dn, dm = (x.clone() for x in d_start)
        d_state = dh, dc, dn, dm + dc * c_start + dn * n_start
        return d_gates, d_kernel, d_bias, *d_state, *(d_scale or [None])

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[1:16])

    @staticmethod
    def backward(ctx, *gradients):
        count = len(ctx.needs_input_grad) - 1
        return None, *second_gradients(ctx.saved_tensors, gradients, count)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Gradient, info.batch_size, in_dims, args)


def contiguous(x):
    return None if x is None else x.contiguous()
