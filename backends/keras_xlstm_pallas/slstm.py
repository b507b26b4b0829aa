"""The sLSTM in Pallas for JAX: the kernel of the op, its gradient, what rules it out.

One launch a direction, see `slstm_walk.py`. The gradients of the recurrent kernel, of the bias and
of recurrent_scale are sums over all steps, which XLA computes after the walk back.

Everything is float32, but the factors of products with the recurrent kernel where the gates come
in bfloat16: these have lost as much as h and R lose by it, sums are float32, and h is fed on with
all its digits. float16 would lose small gradients, and is multiplied as float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from keras_xlstm.ops.mlstm import NEVER
from keras_xlstm_pallas import slstm_walk, xla
from keras_xlstm_pallas.partition import by_batch_and_head
from keras_xlstm_pallas.target import Target, why_not_here

# Heads of which R stays on a TPU, and of which a GPU's registers hold a step, by factors.
WIDEST = {("tpu", "float32"): 512, ("tpu", "bfloat16"): 512}
WIDEST |= {("gpu", "float32"): 64, ("gpu", "bfloat16"): 64}


def why_not(gates, *args, **kwargs):
    if reason := why_not_here(gates):
        return reason
    platform, DH = Target.of().platform, gates.shape[-1]
    factors = jnp.dtype(operands(gates)).name
    if (most := WIDEST[platform, factors]) < DH:
        where = f"on a {platform.upper()}, where products are in {factors}"
        return f"needs heads of at most {most} {where}, received {DH}"


def how(gates, *args):
    target = Target.of()
    return f"{target}, by {chip_of(target).rows_of(gates.shape[0])} rows a program"


def chip_of(target):
    from keras_xlstm_pallas import slstm_gpu, slstm_tpu

    return slstm_tpu if target.platform == "tpu" else slstm_gpu


def slstm(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    inputs = gates, recurrent_kernel, bias, *state, recurrent_scale
    return _compiled(Target.of(), inputs, mask, reset)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(target, inputs, mask, reset):
    flags = None
    if mask is not None or reset is not None:
        flags = jnp.full(inputs[0].shape[:2], slstm_walk.HAPPENS)
        if reset is not None:
            flags = jnp.where(reset, slstm_walk.CLEARED, flags)
        if mask is not None:
            flags = jnp.where(mask, flags, slstm_walk.MASKED)
    h, *state = _slstm(target, inputs, flags)
    return h, tuple(state)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slstm(target, inputs, flags):
    return _forward(target, inputs, flags, keep=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _slstm_and_kept(target, inputs, flags):
    """The outputs, and what `_gradients` wants besides. A function of its own, since whoever asks
    for a second derivative differentiates this one too."""
    results = _forward(target, inputs, flags, keep=True)
    return results[:5], results[5:]


def _forward_and_residuals(target, inputs, flags):
    results = _slstm_and_kept(target, inputs, flags)
    return results, (inputs, flags, *lax.stop_gradient(results))


def _slstm_forward(target, inputs, flags):
    (outputs, _), residuals = _forward_and_residuals(target, inputs, flags)
    return outputs, residuals


def _slstm_backward(target, residuals, d_outputs):
    return _gradients(target, *residuals, d_outputs), None


def _slstm_and_kept_backward(target, residuals, d_results):
    return _gradients(target, *residuals, d_results[0]), None


_slstm.defvjp(_slstm_forward, _slstm_backward)
_slstm_and_kept.defvjp(_forward_and_residuals, _slstm_and_kept_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(target, inputs, flags, outputs, kept, d_outputs):
    gates, R, _, h_start, *_, scale = inputs
    d_raw, *d_state = _backward(target, inputs, flags, outputs, kept, d_outputs)

    h = jnp.concatenate([h_start[:, None], outputs[0][:, :-1]], 1)  # before each step
    if flags is not None:
        h = jnp.where((flags == slstm_walk.CLEARED)[..., None, None], 0.0, h)
    exact = operands(gates) == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    einsum = functools.partial(jnp.einsum, precision=precision)
    d_scale, h_scaled = None, h
    if scale is not None:
        d_scale = einsum("bsgne,ndge,bsnd->bnd", d_raw, R, h)
        h_scaled = h * scale[:, None]
    d_R = einsum("bsnd,bsgne->ndge", h_scaled, d_raw)
    return d_raw.astype(gates.dtype), d_R, d_raw.sum((0, 1)), *d_state, d_scale


def _gradients_forward(target, *arguments):
    return _gradients(target, *arguments), arguments


def _gradients_backward(target, arguments, dd):
    """A second derivative is that of XLA's form, in which outputs are no inputs."""
    inputs, flags, outputs, kept, d_outputs = arguments
    mask = reset = None
    if flags is not None:
        mask, reset = flags != slstm_walk.MASKED, flags == slstm_walk.CLEARED

    def plain(inputs):
        gates, R, bias, *state, scale = inputs
        h, state = xla.slstm(gates, R, bias, tuple(state), mask, reset, scale)
        return h, *state

    def first(inputs, d_outputs):
        return jax.vjp(plain, inputs)[1](d_outputs)[0]

    d_inputs, dd_outputs = jax.vjp(first, inputs, d_outputs)[1](dd)
    return d_inputs, None, *jax.tree.map(jnp.zeros_like, (outputs, kept)), dd_outputs


_gradients.defvjp(_gradients_forward, _gradients_backward)


# What a device computes, of the rows and heads that it has. The names of axes are for
# `partition.py` and for the chip: there are G gates, h, c, n, m in a STATE, and CNM without h.
INPUTS = "B S G NH DH", "NH D G E", "G NH DH", *["B NH DH"] * 5
OUTPUTS = "B S NH DH", *["B NH DH"] * 4


def _forward(target, inputs, flags, keep):
    """h and the state, and with `keep` raw and the states before steps, as the chip has them."""
    chip = chip_of(target)

    def on_device(gates, R, bias, h, c, n, m, scale, flags):
        start = jnp.stack([h, c, n, jnp.where(n == 0, NEVER, m)], 1)
        arrays = [
            (chip.arrange(gates), chip.axes("S G")),
            (jnp.swapaxes(R, 1, 2).astype(operands(gates)), "NH G DH DH"),
            (chip.arrange(bias[None]), chip.axes("G", rows="ONE")),
            (chip.arrange(start), chip.axes("STATE")),
            *_optional(chip, flags, scale),
        ]
        results = chip.axes("S"), chip.axes("STATE"), *(kept if keep else ())
        h, end, *others = launch(target, slstm_walk.forward, gates, arrays, results)
        h_end, c_end, n_end, m_end = unstack(chip.arrange(end))
        m_end = jnp.where(n_end == 0, m, m_end)
        return chip.arrange(h), h_end, c_end, n_end, m_end, *others

    kept = chip.axes("S G"), chip.axes("S CNM")
    results = OUTPUTS + (kept if keep else ())
    return cut(target, on_device, (*inputs, flags), (*INPUTS, "B S"), results)


def _backward(target, inputs, flags, outputs, kept, d_outputs):
    """The gradients of the gates, float32, and of the state."""
    chip = chip_of(target)
    gates, R, _, _, c, n, _, scale = inputs
    dtype = operands(gates)
    kept_axes = chip.axes("S G"), chip.axes("S CNM")

    def on_device(R, c, n, scale, flags, c_end, n_end, raw, before, dh_out, dh, dc, dn, dm):
        # A stabilizer only scales: but for that of the last state, its gradient cancels.
        later = jnp.stack([dh, dc, dn, dm - dc * c_end - dn * n_end], 1)
        arrays = [
            *zip((raw, before), kept_axes, strict=True),
            (jnp.transpose(R, (0, 2, 3, 1)).astype(dtype), "NH G DH DH"),
            (chip.arrange(dh_out), chip.axes("S")),
            (chip.arrange(later), chip.axes("STATE")),
            *_optional(chip, flags, scale),
        ]
        results = chip.axes("S G"), chip.axes("STATE")
        d_raw, earlier = launch(target, slstm_walk.backward, dh_out, arrays, results)
        dh, dc, dn, dm = unstack(chip.arrange(earlier))
        return chip.arrange(d_raw), dh, dc, dn, dm + dc * c + dn * n

    state = "B NH DH"
    arrays = R, c, n, scale, flags, *outputs[2:4], *kept, *d_outputs
    names = "NH D G E", state, state, state, "B S", state, state, *kept_axes, *OUTPUTS
    return cut(target, on_device, arrays, names, ("B S G NH DH", *OUTPUTS[1:]))


def _optional(chip, flags, scale):
    """What stands in for flags and scale in the arguments of a kernel."""
    if flags is not None:
        flags = chip.arrange_flags(flags)
    if scale is not None:
        scale = chip.arrange(scale)
    return (flags, chip.FLAGS), (scale, chip.axes(""))


def launch(target, kernel, sequence, arrays, results):
    """Runs a kernel on pairs of an array, or `None`, and its axes. Results are float32.

    `sequence` is (B, S, ..., NH, DH).
    """
    B, S, *_, NH, DH = sequence.shape
    sizes = {"B": B, "S": S, "NH": NH, "DH": DH, "G": 4, "STATE": 4, "CNM": 3, "ONE": 1}
    return chip_of(target).launch(kernel, target.interpreted, sizes, arrays, results)


def cut(target, function, arrays, names, results):
    """`function(*arrays)`, some of which may be `None`, on each device of what it has."""
    there = [x is not None for x in arrays]

    def of_those(*arrays):
        arrays = iter(arrays)
        return function(*(next(arrays) if x else None for x in there))

    pairs = [(x, axes) for x, axes in zip(arrays, names, strict=True) if x is not None]
    arrays, names = zip(*pairs, strict=True)
    return by_batch_and_head(of_those, names, results, target.platform == "tpu")(*arrays)


def unstack(state):
    return tuple(state[:, k] for k in range(4))


def operands(gates):
    """The dtype of the factors in products with the recurrent kernel."""
    return jnp.bfloat16 if gates.dtype == jnp.bfloat16 else jnp.float32
