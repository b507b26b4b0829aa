"""Products, norms and losses for torch on the CPU.

`torch.matmul` in float32 is MKL's, which does not use the wider registers of processors that
Intel did not build; torch carries oneDNN too, which does: twice as fast there. The soft cap and
the loss write their gradients out, since each pass over the logits of a large vocabulary costs as
much as the product that gave them; so does the norm, which torch composes of many.
"""

import torch

from keras_xlstm_triton.products import mkl_is_best

FEWEST_PRODUCTS = 2**20  # below, the call costs more than it saves


def why_not(x=None, *args, **kwargs):
    # Where Keras, or a user of `explain`, asks for shapes only.
    if x is not None and (not isinstance(x, torch.Tensor) or x.device.type == "meta"):
        return "leaves tensors without numbers to the plain form"
    # An exported graph has no use for gradients, and outside torch nothing knows of them.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return "leaves a graph to export to the plain form"


def why_not_linear(x, weights):
    if reason := why_not(x):
        return reason
    if torch.compiler.is_compiling():
        return "leaves the choice to torch.compile"
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return f"needs a CPU and torch built with oneDNN, received {x.device.type}"
    if x.dtype != torch.float32 or weights.dtype != torch.float32:
        return f"needs float32, received {x.dtype} and {weights.dtype}"
    if torch.is_autocast_enabled("cpu"):
        return "leaves torch.autocast to torch.matmul"
    if mkl_is_best():
        return "leaves products to torch's own library, MKL, which Intel wrote for this processor"
    rows = x[..., 0].numel()
    if rows == 1:
        return "needs more than one row"
    if rows * weights.numel() < FEWEST_PRODUCTS:
        return f"needs {FEWEST_PRODUCTS} products to pay, received {rows * weights.numel()}"


def linear(x, weights):
    return Product.apply(x.reshape(-1, x.shape[-1]), weights).view(*x.shape[:-1], -1)


class Product(torch.autograd.Function):
    """(R, D) times (D, N)."""

    @staticmethod
    def forward(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d):
        (a, b), da, db = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            da = Product.apply(d, b.mT)
        if ctx.needs_input_grad[1]:  # oneDNN copies what is transposed on the left
            db = Product.apply(a.mT, d) if a.numel() < d.numel() else Product.apply(d.mT, a).mT
        return da, db

    @staticmethod
    def vmap(info, in_dims, *args):
        batched = (
            x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims, strict=True)
        )
        return torch.matmul(*batched), 0


def soft_cap(x, cap):
    return SoftCap.apply(x, cap)


class SoftCap(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, cap):
        return (x / cap).tanh_().mul_(cap)

    @staticmethod
    def setup_context(ctx, inputs, y):
        ctx.cap = inputs[1]
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return dy * (1 - (y / ctx.cap).square()), None
        return y.square().mul_(-(ctx.cap**-2)).add_(1).mul_(dy), None


def normalize(x, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def why_not_rms_normalize(x, scale, eps):
    if reason := why_not(x):
        return reason
    if torch.compiler.is_compiling():
        return "leaves it to torch.compile to make the plain form one"
    if x.device.type != "cpu":
        return f"needs a CPU: torch has one form for {x.device.type}"
    if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
        return "pays where there is a gradient to take"


def rms_normalize(x, scale, eps):
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = RMSNormalize.apply(x.to(dtype).reshape(-1, x.shape[-1]), scale.to(dtype), eps)
    return y.view(x.shape).to(x.dtype)


class RMSNormalize(torch.autograd.Function):
    """Keeps its input only. Of x (R, D) and scale (D)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, eps):
        return x * over_rms(x, eps) * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, ctx.eps = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        factor = over_rms(x, ctx.eps)
        both = dy * x
        along = (both @ scale)[:, None] * (factor**3 / -x.shape[1])
        d_scale = factor[:, 0] @ both
        if torch.is_grad_enabled():  # to be differentiated again
            return dy * scale * factor + x * along, d_scale, None
        return (dy * scale).mul_(factor).addcmul_(x, along), d_scale, None


def over_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) of each row."""
    if torch.is_grad_enabled():  # where the length is 0, it has no second derivative
        return (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (length.square() / x.shape[-1] + eps).rsqrt()


def cross_entropy(logits, targets):
    loss = CrossEntropy.apply(logits.flatten(0, -2), targets.flatten().long())
    return loss.view(targets.shape)


class CrossEntropy(torch.autograd.Function):
    """Keeps the logits only: their softmax is computed again where the gradient wants it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, targets):
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_loss):
        logits, targets = ctx.saved_tensors
        d_loss, targets = d_loss[:, None], targets[:, None]
        d_logits = torch.softmax(logits, -1)
        d_logits = d_logits * d_loss if torch.is_grad_enabled() else d_logits.mul_(d_loss)
        return d_logits.scatter_add_(1, targets, -d_loss), None
