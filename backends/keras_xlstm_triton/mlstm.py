"""The chunkwise mLSTM for torch on GPUs: launches the kernels of `mlstm_walk.py`."""

import functools
import importlib.util
import math
import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from keras_xlstm_triton import autotune, eager_linear
from keras_xlstm_triton.eager_mlstm import (
    first_gradients,
    fold_into_batch,
    inner,
    second_gradients,
    to_the_maximum,
)
from keras_xlstm_triton.mlstm_plan import MOST, Device, Plan, Tiles, others, plan

DTYPES = torch.float32, torch.float16, torch.bfloat16
INSTALLED = importlib.util.find_spec("triton") is not None
FEWEST = 2**32  # products with a memory; a call of fewer is not worth timing plans
SCAN = 1024  # steps that `stabilizers` scans at a time


def mlstm(q, k, v, i, log_f, s, state, *, chunk_size, eps, segments=None, tiles=None):
    """A kernel of the operation "mlstm"; `segments` and `tiles` for tests, which choose them."""
    dtype = functools.reduce(torch.promote_types, (k.dtype, v.dtype), q.dtype)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    s = s.view_as(s)  # where it is i itself: Dynamo wants inputs apart
    with torch.autocast(q.device.type, enabled=False):
        numbers = plan_of(q, v, chunk_size, segments, tiles).numbers()
        h, C, n, m, *_ = Chunkwise.apply(numbers, eps, q, k, v, i, log_f, s, *state)
    return h, (C, n, m)


def why_not(q, k, v, *args, **kwargs):
    return why_not_multiplied(q, k, v)


def why_not_here(*tensors):
    """What rules out Triton for these, whatever the kernel."""
    if reason := eager_linear.why_not(tensors[0]):
        return reason
    device, dtypes = tensors[0].device.type, {x.dtype for x in tensors}
    if device != "cuda" and not (interpreted() and device == "cpu"):
        return f"needs CUDA tensors, received {device}"
    if not INSTALLED:
        return "needs Triton, which is not installed"
    if not dtypes <= set(DTYPES):
        return f"needs float32, float16 or bfloat16, received {sorted(map(str, dtypes))}"


def why_not_multiplied(*tensors):
    if reason := why_not_here(*tensors):
        return reason
    if interpreted() and torch.bfloat16 in {x.dtype for x in tensors}:
        return "needs a GPU for bfloat16, which Triton's interpreter does not multiply"


def interpreted():
    """Whether Triton runs kernels on the CPU, one operation of NumPy after the other."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


def how(q, k, v, *args, chunk_size, **kwargs):
    sizes, plans, key = choices(q, v, chunk_size)
    if len(plans) == 1:
        return str(plan(*sizes))
    known = autotune.known(key, plans)
    timed = f"the first call times {len(plans)} plans" if known is None else "as it was timed"
    return f"{plan(*sizes, tiles=tiles_in(known or plans[0]))}, {timed}"


def plan_of(q, v, chunk_size=None, segments=None, tiles=None):
    sizes, plans, key = choices(q, v, chunk_size, segments)
    if len(plans) == 1 or tiles:
        return plan(*sizes, tiles=tiles)
    is_free = not (is_in_torch_dispatch_mode() or torch.cuda.is_current_stream_capturing())
    run = functools.partial(try_out, sizes) if is_free else None
    return plan(*sizes, tiles=tiles_in(autotune.choose(key, plans, run)))


def choices(q, v, chunk_size, segments=None):
    """The arguments of `plan`, lists of tiles of which the first is the model's, and their key."""
    (B, S, NH, DHQK), DHHV, device = q.shape, v.shape[-1], Device.of(q)
    S, heads = map(int, (S, B * NH))  # a number each, where they are traced
    sizes = q.dtype, S, heads, DHQK, DHHV, device, chunk_size or None, segments or None
    L, _, *tiles = plan(*sizes)
    is_short = heads * S * DHQK * DHHV < FEWEST or S < MOST or chunk_size or segments
    if is_short or torch.compiler.is_compiling() or q.device.type != "cuda":
        return sizes, [flat(tiles)], ""
    name = f"mlstm {q.dtype} {DHQK}x{DHHV} {device.name} triton {triton_version()}"
    return sizes, [flat(x) for x in others(q.dtype, L, DHQK, DHHV, device)], name


def triton_version():
    import triton

    return triton.__version__


def flat(tiles):
    return [int(number) for x in tiles for number in x]


def tiles_in(numbers):
    return Tiles(*numbers[:4]), Tiles(*numbers[4:])


def try_out(sizes, numbers):
    """A call of a plan forward and backward, smaller than the one that asks for it."""
    dtype, S, heads, DHQK, DHHV, *rest = sizes
    S, heads = min(S, 1024), min(heads, 64)
    chosen = plan(dtype, S, heads, DHQK, DHHV, *rest, tiles=tiles_in(numbers)).numbers()
    random = torch.Generator("cuda").manual_seed(0)

    def new(*shape, dtype=torch.float32):
        return torch.randn(1, *shape, generator=random, device="cuda").to(dtype)

    q, k, v, dh = (new(S, heads, width, dtype=dtype) for width in (DHQK, DHQK, DHHV, DHHV))
    i, log_f = new(S, heads), -new(S, heads).square()
    C, n, m = new(heads, DHQK, DHHV), new(heads, DHQK), new(heads)
    h, dC, dn, *kept = forward(q, k, v, i, log_f, i, C, n, m, chosen, 1e-6)
    backward(dh, dC, dn, q, k, v, C, n, h, *kept, chosen, 1e-6)


# Launches


class Calls:
    """Launches walks over the same sequence."""

    def __init__(self, plan, q, v, eps, **tensors):
        (self.B, self.S, self.NH, self.DHQK), self.DHHV = q.shape, v.shape[-1]
        self.plan, self.eps, self.tensors = plan, eps, tensors
        self.chunks = -(-self.S // plan.L)
        self.chunks_each = -(-self.chunks // plan.segments)
        self.dtypes = dict(zip(("DOT", "PRECISION"), operands(q.dtype), strict=True))

    def walk(self, name, a, b, c, d=None, *, OUT=True, **tensors):
        from keras_xlstm_triton.mlstm_walk import walk

        by_key = name in ("dq", "dk")
        tiles = self.plan.by_key if by_key else self.plan.by_value
        widths = (self.DHHV, self.DHQK) if by_key else (self.DHQK, self.DHHV)
        a, d = (b if x is None else x for x in (a, d))  # what this walk does not read
        arrays = [stride for x in (a, b, c, d) for stride in x.stride()[:3]]
        tensors = dict.fromkeys(STEPS + STATES, b) | self.tensors | tensors
        segments = self.plan.segments
        programs = self.B * self.NH * segments * tiles.tiles(widths[1])
        if not tiles.on_chip:
            new = functools.partial(b.new_empty, dtype=torch.float32)
            tensors["M_work"] = new(self.B, self.NH, segments, self.DHQK, self.DHHV)
            tensors["n_work"] = new(programs, self.DHQK)
        walk[(programs,)](
            a, b, c, d, tensors.pop("out", b), *arrays, **tensors, **self.dtypes,
            S=self.S, NH=self.NH, segments=segments,
            chunks=self.chunks, chunks_each=self.chunks_each, eps=self.eps,
            FULL_WIDTH=widths[0], TILE_WIDTH=widths[1], SLICE=tiles.slice, TILE=tiles.tile,
            ON_CHIP=tiles.on_chip, L=self.plan.L, WALK=name, OUT=OUT,
            num_warps=tiles.warps, num_stages=1, **registers(OUT, torch.version.hip is not None),
        )  # fmt: skip

    def before_segments(self, name, b, c, C, n, memories):
        """The memories that segments start from, of a first one and what `b` and `c` add."""
        from keras_xlstm_triton.mlstm_steps import chain

        segments, heads = self.plan.segments, self.B * self.NH
        if segments == 1:
            return C, n
        over = n.new_empty(heads, segments)
        out = {"C_out": memories[0], "n_out": memories[1], "over_out": over}
        self.walk(name, None, b, c, OUT=False, **out)
        for memory, first in zip(memories, (C, n), strict=True):
            size = first[0, 0].numel()
            block = min(1024, 1 << (size - 1).bit_length())
            grid = (heads * -(-size // block),)
            chain[grid](memory, over, first, segments, size, BACK=name == "dk", BLOCK=block)
        return memories


STEPS = "weights", "over", "reads", "nq", "di", "dlog_f"
STATES = "C_in", "n_in", "C_out", "n_out", "over_out", "C_kept", "n_kept", "M_work", "n_work"


def registers(out, is_amd):
    """All, for the first pass, which has a processor for each program: ptxas would spill some to
    run more of them at a time."""
    return {} if out or is_amd else {"maxnreg": 255}


def operands(dtype):
    """Of operands that are computed, the dtype and the precision of products.

    Weights and memories may be too small for float16: beside it they are float32, and tensor cores
    multiply them as tf32, which holds float16 exactly.
    """
    from triton import language as tl

    if dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "tf32" if dtype == torch.float16 else "ieee"


def readable(x):
    """Strides may be any, but the last axis must lie in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, s: Tensor,
    C: Tensor, n: Tensor, m_in: Tensor, numbers: list[int], eps: float,
) -> list[Tensor]:  # fmt: skip
    """h, C, n; of each step m, n^T q and what gates weigh; and the memories before segments."""
    from keras_xlstm_triton.mlstm_steps import stabilizers, weigh

    plan, shapes = Plan.of(numbers), forward_shapes(q, v, numbers)
    h, C_end, n_end, m, nq, weights, over, *starts = shapes
    B, S, NH, DHQK = q.shape
    block = min(1 << (S - 1).bit_length(), SCAN)
    stabilizers[(B * NH,)](log_f, s, m_in, m, S, NH, BLOCK=block, num_warps=4)
    calls = Calls(plan, q, v, eps, weights=weights, over=over)
    weigh[(B * NH * calls.chunks,)](
        i, log_f, m, m_in, weights, over, S, NH, calls.chunks, -0.5 * math.log(DHQK), L=plan.L,
        num_warps=1,
    )  # fmt: skip
    C_in, n_in = calls.before_segments("dq", v, k, C, n, starts)
    states = {"C_in": C_in, "n_in": n_in, "C_out": C_end, "n_out": n_end}
    calls.walk("h", q, k, v, out=h, nq=nq, **states)
    return shapes


def forward_shapes(q, v, numbers):
    """Tensors for what `forward` returns."""
    plan, (B, S, NH, DHQK), DHHV = Plan.of(numbers), q.shape, v.shape[-1]
    chunks, starts = -(-S // plan.L), plan.segments if plan.segments > 1 else 0
    new = functools.partial(q.new_empty, dtype=torch.float32)
    return [
        v.new_empty(v.shape),
        *(new(B, NH, DHQK, DHHV), new(B, NH, DHQK)),
        *(new(B, S, NH), new(B, NH, chunks, plan.L), new(B, NH, chunks, 7, plan.L)),
        new(B, NH, chunks),
        *(new(B, NH, starts, DHQK, DHHV), new(B, NH, starts, DHQK)),
    ]


def backward(
    dh: Tensor, dC: Tensor, dn: Tensor, q: Tensor, k: Tensor, v: Tensor, C: Tensor, n: Tensor,
    h: Tensor, m: Tensor, nq: Tensor, weights: Tensor, over: Tensor, C_in: Tensor, n_in: Tensor,
    numbers: list[int], eps: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q, k, v, of C and n, of all m, and in parts those of i and log_f.

    Those of all but m take m as a constant.
    """
    from keras_xlstm_triton.mlstm_steps import through_denominator

    plan = Plan.of(numbers)
    calls = Calls(plan, q, v, eps, weights=weights, over=over)
    (B, S, NH, DHQK), DHHV, chunks = q.shape, v.shape[-1], calls.chunks
    gradients = backward_shapes(q, k, v, C, n, m, numbers)
    dq, dk, dv, dC_first, dn_first, dm, di, dlog_f = gradients
    reads = m.new_empty(B, NH, chunks, 2, plan.L)
    through_denominator[(B * NH * chunks,)](
        dh, *dh.stride()[:3], h, nq, weights, reads, dm, S, NH, chunks, eps,
        DHHV=DHHV, WIDTH=min(1 << (DHHV - 1).bit_length(), 64), L=plan.L, num_warps=4,
    )  # fmt: skip
    calls.tensors["reads"] = reads
    if plan.segments == 1:
        C_in, n_in = C, n

    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    kept = {
        "C_kept": C.new_empty(B, NH, chunks, DHQK, DHHV, dtype=dtype),
        "n_kept": n.new_empty(B, NH, chunks, DHQK),
        "dlog_f": dlog_f,
    }
    calls.walk("dq", dh, v, k, q, out=dq, C_in=C_in, n_in=n_in, **kept)
    starts = [x.new_empty(B, NH, plan.segments, *x.shape[2:]) for x in (C, n)]
    dC, dn = calls.before_segments("dk", dh, q, dC, dn, starts)
    states = {"C_in": dC, "n_in": dn, "C_out": dC_first, "n_out": dn_first}
    calls.walk("dk", v, dh, q, k, out=dk, di=di, **kept, **states)
    calls.walk("dv", k, q, dh, out=dv, **states)
    return gradients


def backward_shapes(q, k, v, C, n, m, numbers):
    """Tensors for what `backward` returns."""
    plan, (B, S, NH, DHQK) = Plan.of(numbers), q.shape
    gates = plan.by_key.tiles(DHQK), B, NH, -(-S // plan.L) * plan.L
    alike = [x.new_empty(x.shape) for x in (q, k, v, C, n, m)]
    return [*alike, m.new_empty(gates), m.new_empty(gates)]


def operator(name, function, shapes):
    """The function itself, but in what is traced one operator."""
    traced = torch.library.custom_op(f"keras_xlstm::{name}", function, mutates_args=())
    traced.register_fake(shapes)

    def call(*args):
        is_traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        return (traced if is_traced else function)(*args)

    return call


forward_operator = operator(
    "mlstm_forward",
    forward,
    lambda q, k, v, i, log_f, s, C, n, m_in, numbers, eps: forward_shapes(q, v, numbers),
)
backward_operator = operator(
    "mlstm_backward",
    backward,
    lambda dh, dC, dn, q, k, v, C, n, h, m, nq, weights, over, C_in, n_in, numbers, eps: (
        backward_shapes(q, k, v, C, n, m, numbers)
    ),
)

# Autograd


class Chunkwise(torch.autograd.Function):
    """h, C, n and m, and what the gradient needs."""

    @staticmethod
    def forward(numbers, eps, q, k, v, i, log_f, s, C, n, m):
        q, k, v = map(readable, (q, k, v))
        i, log_f, s, C, n, m = (x.contiguous() for x in (i, log_f, s, C, n, m))
        tensors = q, k, v, i, log_f, s, C, n, m
        h, C, n, *kept = forward_operator(*tensors, numbers, eps)
        return h, C, n, kept[0][:, -1].clone(), *kept

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *ctx.options, q, k, v, i, log_f, s, C, n, m = inputs
        ctx.mark_non_differentiable(*outputs[4:])
        ctx.set_materialize_grads(False)  # zeros for all that is kept
        ctx.save_for_backward(q, k, v, i, log_f, s, C, n, m, *outputs)

    @staticmethod
    def backward(ctx, *d_outputs):
        gradients = first_gradients(Gradient, ctx.options, d_outputs, ctx.saved_tensors)
        return None, None, *gradients

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Chunkwise, info.batch_size, in_dims, args)


class Gradient(torch.autograd.Function):
    """The gradients with respect to q, k, v, i, log_f, s, C, n and m."""

    @staticmethod
    def forward(numbers, eps, dh, dC, dn, dm, *saved):
        q, k, v, i, log_f, s, C, n, m, h, C_end, n_end, _, m_t, *kept = saved
        q, k, v, dh = map(readable, (q, k, v, dh))
        # What `forward` wrote too: under vmap, it may be the same for all.
        C, n, dC, dn, h, *kept = (x.contiguous() for x in (C, n, dC, dn, h, m_t, *kept))
        tensors = dh, dC, dn, q, k, v, C, n, h, *kept
        gradients = backward_operator(*tensors, numbers, eps)
        *gradients, dC_first, dn_first, dm_t, di, dlog_f = gradients
        di, dlog_f = (x.sum(0)[..., : q.shape[1]].transpose(1, 2) for x in (di, dlog_f))
        # A stabilizer only scales, so its gradient cancels, but for eps and the last state. What
        # is left flows to the step that set the maximum.
        dm = dm - inner(dC, C_end) - inner(dn, n_end)
        ds, more_log_f, dm = to_the_maximum(dm_t.double(), dm, m_t.double(), log_f, s, m)
        dm = dm + inner(dC_first, C) + inner(dn_first, n)
        gates = (x.to(i.dtype) for x in (di, dlog_f + more_log_f, ds))
        return *gradients, *gates, dC_first, dn_first, dm.to(m.dtype)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *ctx.options, _, _, _, _ = inputs[:6]
        ctx.save_for_backward(*inputs[2:15])

    @staticmethod
    def backward(ctx, *gradients):
        numbers, eps = ctx.options
        second = second_gradients(Plan.of(numbers).L, eps, ctx.saved_tensors, gradients)
        return None, None, *second, *[None] * (len(ctx.needs_input_grad) - 2 - len(second))

    @staticmethod
    def vmap(info, in_dims, *args):
        return fold_into_batch(Gradient, info.batch_size, in_dims, args)
