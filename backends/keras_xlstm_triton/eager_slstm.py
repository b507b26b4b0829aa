"""The sLSTM for torch, in plain torch, with its gradient written out.

Mathematics and names are those of `keras_xlstm/ops/slstm.py`; the plan, explained there, is that of
`keras_xlstm/ops/slstm_loop.py`. Here the loops write in place, into tensors that hold all steps.
"""

import torch

from keras_xlstm.ops.mlstm import NEVER
from keras_xlstm.ops.slstm import slstm_scan


@torch.compiler.disable(reason="a loop over the steps, which compiled code would unroll")
def slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    inputs = gates, recurrent_kernel, bias, *state, recurrent_scale
    with torch.autocast(gates.device.type, enabled=False):
        h, *state = Steps.apply(mask, reset, *inputs)[:5]
    return h, tuple(state)


class Steps(torch.autograd.Function):
    """h, the state (h, c, n, m), and of all steps what the gradient needs."""

    @staticmethod
    def forward(mask, reset, gates, recurrent_kernel, bias, h, c, n, m, scale):
        B, S, _, NH, DH = gates.shape
        R = recurrent_kernel.flatten(2)
        raw = gates.new_empty((S, NH, B, 4, DH), dtype=torch.float32)
        torch.add(gates.permute(1, 3, 0, 2, 4), bias.transpose(0, 1)[:, None], out=raw)
        # The state before step t stands at t, that after the last at S.
        states = raw.new_empty((S + 1, 4, NH, B, DH))
        for x, start in zip(states[0], (h, c, n, m), strict=True):
            x.copy_(start.transpose(0, 1))
        m_start = states[0, 3].clone()
        states[0, 3].masked_fill_(states[0, 2] == 0, NEVER)
        scale = None if scale is None else scale.transpose(0, 1)
        fresh = raw.new_tensor([0, 0, 0, NEVER])[:, None, None, None]
        happens, cleared = each_step(mask), each_step(reset)

        forget_input, tanh_one = raw.new_empty((2, NH, B, DH)), raw.new_ones((2, NH, B, DH))
        F, I = forget_input
        for t, (x, before, after) in enumerate(zip(raw, states[:-1], states[1:], strict=True)):
            if reset is not None:
                before = torch.where(cleared[t], fresh, before)
            h, cn, m = before[0], before[1:3], before[3]
            x.flatten(2).baddbmm_(h if scale is None else h * scale, R)
            i, f, z, o = x.unbind(2)
            h_new, cn_new, m_new = after[0], after[1:3], after[3]
            torch.add(torch.nn.functional.logsigmoid(f), m, out=F)
            torch.maximum(i, F, out=m_new)
            F -= m_new
            torch.sub(i, m_new, out=I)
            forget_input.exp_()
            torch.tanh(z, out=tanh_one[0])
            torch.mul(F, cn, out=cn_new).addcmul_(I, tanh_one)
            torch.div(after[1], after[2], out=h_new).mul_(torch.sigmoid(o))
            if mask is not None:
                torch.where(happens[t], after, states[t], out=after)

        end = states[-1].transpose(1, 2).clone()
        end[3] = torch.where(end[2] == 0, m_start.transpose(0, 1), end[3])
        h = states[1:, 0].permute(2, 0, 1, 3).contiguous()
        return h, *(x.clone() for x in end), raw, states

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.mark_non_differentiable(*outputs[5:])
        ctx.set_materialize_grads(False)  # zeros for all that is kept
        ctx.save_for_backward(*inputs, *outputs[5:])

    @staticmethod
    def backward(ctx, *d_outputs):
        return None, None, *first_gradients(Gradient, (), d_outputs, ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Steps, info.batch_size, in_dims, args)


class Gradient(torch.autograd.Function):
    """The gradients with respect to gates, recurrent_kernel, bias, h, c, n, m and scale."""

    @staticmethod
    def forward(dh_out, dh, dc, dn, dm, mask, reset, gates, kernel, bias, h, c, n, m, scale, *kept):
        raw, states = kept
        R = kernel.flatten(2).mT.contiguous()
        scale = None if scale is None else scale.transpose(0, 1)
        happens, cleared = each_step(mask), each_step(reset)
        before, after = states[:-1], states[1:]
        if reset is not None:
            fresh = raw.new_tensor([0, 0, 0, NEVER])[:, None, None, None]
            before = torch.where(cleared[:, None], fresh, before)
        h_before, c_before, n_before, m_before = before.unbind(1)
        h_new, _, n_new, m_new = after.unbind(1)

        # What the gradients of a step are multiples of: of c and n in h; of i, f and z in c and n.
        i, f, z, o = raw.unbind(3)
        F = torch.exp(torch.nn.functional.logsigmoid(f).add_(m_before).sub_(m_new))
        I, tanh_z, sigmoid_o = torch.exp(i - m_new), torch.tanh(z), torch.sigmoid(o)
        f_log_f = torch.sigmoid(-f)
        F_f = F * f_log_f
        h_cn = torch.stack([sigmoid_o / n_new, -h_new / n_new], 1)
        h_o = h_new * (1 - sigmoid_o)
        c_ifz = torch.stack([I * tanh_z, F_f * c_before, I * (1 - tanh_z.square())], 3)
        n_if = torch.stack([I, F_f * n_before], 3)
        set_by_i = m_new == i
        if mask is not None:
            h_cn = torch.where(happens[:, None], h_cn, 0)
            c_ifz, n_if = (torch.where(happens[:, :, :, None], x, 0) for x in (c_ifz, n_if))
            h_o, f_log_f, set_by_i = (torch.where(happens, x, 0) for x in (h_o, f_log_f, set_by_i))
            F = torch.where(happens, F, 1)

        dh, dcn, dm = dh.transpose(0, 1), torch.stack([dc, dn]).transpose(1, 2), dm.transpose(0, 1)
        dm = dm - (dcn * states[-1, 1:3]).sum(0)
        # It flows back to the step whose input gate set the last stabilizer.
        steps = torch.arange(1, len(raw) + 1, device=raw.device)[:, None, None, None]
        last = (set_by_i * steps).amax(0)
        d_raw = torch.zeros_like(raw)
        d_raw[:, :, :, 0] = torch.where(steps == last, dm, 0)
        d_raw[:, :, :, 1] = torch.where(steps > last, dm, 0) * f_log_f

        dh, dcn, dh_out = dh.clone(), dcn.contiguous(), dh_out.permute(1, 2, 0, 3)
        dc, dn = dcn[0, :, :, None], dcn[1, :, :, None]
        for t in reversed(range(len(raw))):
            dh += dh_out[t]
            dcn.addcmul_(dh, h_cn[t])
            d_raw[t, :, :, :3].addcmul_(dc, c_ifz[t])
            d_raw[t, :, :, :2].addcmul_(dn, n_if[t])
            torch.mul(dh, h_o[t], out=d_raw[t, :, :, 3])
            dcn *= F[t]
            later, dh = dh, d_raw[t].flatten(2) @ R
            if scale is not None:
                dh *= scale
            if reset is not None:
                dh.masked_fill_(cleared[t], 0)
            if mask is not None:
                dh = torch.where(happens[t], dh, later)

        dm = torch.where(last == 0, dm, 0) + (dcn * states[0, 1:3]).sum(0)
        d_scale = None
        if scale is not None:
            d_scale = torch.einsum("snbge,ndge,snbd->bnd", d_raw, kernel, h_before)
            h_before = h_before * scale
        d_kernel = h_before.permute(1, 3, 0, 2).flatten(2) @ d_raw.flatten(3).transpose(
            0, 1
        ).flatten(1, 2)
        d_gates = torch.empty_like(gates)
        d_gates.permute(1, 3, 0, 2, 4).copy_(d_raw)
        d_bias = d_raw.sum((0, 2)).transpose(0, 1).contiguous()
        d_state = (x.transpose(0, 1).contiguous() for x in (dh, *dcn, dm))
        return d_gates, d_kernel.view_as(kernel), d_bias, *d_state, d_scale

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.save_for_backward(*inputs[:15])

    @staticmethod
    def backward(ctx, *gradients):
        return second_gradients(ctx.saved_tensors, gradients, len(ctx.needs_input_grad))

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Gradient, info.batch_size, in_dims, args)


def first_gradients(function, options, d_outputs, saved):
    """Of an autograd function; `saved` are mask and reset, its eight inputs, and what was kept."""
    gates, state = saved[2], saved[5:9]
    d_outputs = [
        torch.zeros_like(x, dtype=torch.float32) if dx is None else dx
        for x, dx in zip((gates[:, :, 0], *state), d_outputs[:5], strict=True)
    ]
    # Compiled code is not differentiated twice, and a function in a function confuses Dynamo.
    gradient = function.forward if torch.compiler.is_compiling() else function.apply
    with torch.autocast(gates.device.type, enabled=False):
        return gradient(*options, *d_outputs, *saved)


def second_gradients(saved, gradients, count):
    """The gradient's own, which torch derives from the loop in `keras.ops`.

    `saved` are the gradients of h and the state, mask and reset, and the inputs. Returned are
    those of `count` arguments.
    """
    *d_outputs, mask, reset = saved[:7]
    *inputs, scale = saved[7:]
    if scale is not None:
        inputs.append(scale)

    def outputs(gates, kernel, bias, h, c, n, m, scale=None):
        h, state = slstm_scan(gates, kernel, bias, (h, c, n, m), mask, reset, scale)
        return h, *state

    def gradient(*tensors):
        return torch.func.vjp(outputs, *tensors[5:])[1](tensors[:5])

    with torch.autocast(gradients[0].device.type, enabled=False):
        second = torch.func.vjp(gradient, *d_outputs, *inputs)[1](gradients[: len(inputs)])
    second = *second[:5], None, None, *second[5:]
    return *second, *[None] * (count - len(second))


def each_step(flag):
    """(B, S) -> (S, 1, B, 1)."""
    return None if flag is None else flag.mT[:, None, :, None]


def one_by_one(function, size, in_dims, args):
    """`torch.vmap` where no axis can be made longer: the recurrent kernel may be batched too."""

    def of(number):
        pairs = zip(args, in_dims, strict=True)
        return [x if dim is None else x.select(dim, number) for x, dim in pairs]

    outputs = zip(*(function.apply(*of(number)) for number in range(size)), strict=True)
    outputs = tuple(None if x[0] is None else torch.stack(x) for x in outputs)
    return outputs, tuple(None if x is None else 0 for x in outputs)
