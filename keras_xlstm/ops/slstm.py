"""The sLSTM: scalar memories with memory mixing inside each head (arXiv:2405.04517, Sec. 2.2).

Per step, with the head's hidden state h, `raw = gates + R h + bias` in the order i, f, z, o, and
`lf = logsigmoid(f)`; the state `(h, c, n, m)` is all zero at first:

    m' = max(i, lf + m), and m' = i where n == 0     stabilizer, elementwise
    c' = exp(lf + m - m') c + exp(i - m') tanh(z)    cell
    n' = exp(lf + m - m') n + exp(i - m')            normalizer
    h' = sigmoid(o) c' / n'

`n == 0` is asked of every element: a batch may hold fresh and running states side by side.

A kernel of the operation "slstm" is
`kernel(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale)`, with gates
(B, S, 4, NH, DH) in the compute dtype, B and S >= 1, and the rest in float32; mask and reset are
bool or `None`, reset is already `False` where mask is, and recurrent_scale may be `None`. It
returns h (B, S, NH, DH), as it stands in the state, and the next state.
"""

from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_xlstm import kernels
from keras_xlstm.ops.checks import (
    as_flags,
    as_state,
    as_tensor,
    check_positive_int,
    check_shapes,
    check_widths,
)
from keras_xlstm.ops.mlstm import MAX_EXPONENT, bounded, nothing_given, step_by_step
from keras_xlstm.ops.products import exact
from keras_xlstm.ops.scan import scan


def slstm(
    gates,
    recurrent_kernel,
    bias,
    *,
    initial_state=None,
    mask=None,
    reset=None,
    recurrent_scale=None,
    return_state=False,
    kernel="auto",
):
    """The sLSTM over a sequence.

    Args:
        gates: float tensor, (B, S, 4, NH, DH): what the input gives to i, f, z and o. What lies
            beyond ±65504, infinity too, counts as ±65504.
        recurrent_kernel: float tensor, (NH, DH, 4, DH): from the head's hidden state to its
            gates.
        bias: float tensor, (4, NH, DH).
        initial_state: h, c, n, m, each (B, NH, DH). `None` for zeros.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen, whatever `reset`
            says there: the state passes through unchanged, and the output is 0.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step.
        recurrent_scale: float tensor, (B, NH, DH), multiplies h where it is fed back to the
            gates: recurrent dropout. `None` for ones.
        return_state: bool, whether to return the state after the last step.
        kernel: string, a name from `keras_xlstm.kernels.available("slstm")`, or `"auto"`.

    Returns:
        h, (B, S, NH, DH) in the dtype of `gates`; with `return_state` also the state
        `(h, c, n, m)`, float32.

    Raises:
        ValueError: if shapes do not fit each other, or the kernel cannot serve the call.

    Source: Beck et al. 2024, arXiv:2405.04517, Eqs. 8-18.

    Example:

    ```python
    gates = keras.random.normal((2, 10, 4, 3, 8))
    h = slstm(gates, keras.random.normal((3, 8, 4, 8)), keras.ops.zeros((4, 3, 8)))
    ```
    """
    args, kwargs = prepare(
        gates, recurrent_kernel, bias, initial_state, mask, reset, recurrent_scale
    )
    chosen = kernels.choose("slstm", kernel, args, kwargs)
    if chosen is None or in_symbolic_scope():  # there, Keras asks for shapes and dtypes only
        h, state = args[0][:, :, 0], args[3]
    else:
        h, state = chosen.run(*args, **kwargs)
    h = ops.cast(h, args[0].dtype)
    if mask is not None:
        h = ops.where(ops.cast(mask, "bool")[:, :, None, None], h, ops.zeros_like(h))
    return (h, state) if return_state else h


def slstm_step(
    gates, recurrent_kernel, bias, state, *, mask=None, reset=None, recurrent_scale=None
):
    """One step of the sLSTM: the definition, see the head of this file.

    Args:
        gates: float tensor, (B, 4, NH, DH).
        recurrent_kernel, bias: as in `slstm`.
        state: h, c, n, m, each (B, NH, DH).
        mask, reset: bool tensors, (B,), as in `slstm`.
        recurrent_scale: as in `slstm`.

    Returns:
        h, (B, NH, DH) in the dtype of `gates`, and the next state, float32.

    Example:

    ```python
    gates, kernel = keras.random.normal((2, 4, 3, 8)), keras.random.normal((3, 8, 4, 8))
    h, state = slstm_step(gates, kernel, keras.ops.zeros((4, 3, 8)), slstm_zero_state(2, 3, 8))
    ```
    """
    gates, (mask, reset) = as_tensor("gates", gates), as_flags(mask=mask, reset=reset)
    check_shapes(gates=(gates, "B 4 NH DH"), mask=(mask, "B"), reset=(reset, "B"))
    mask, reset = (x if x is None else ops.expand_dims(x, 1) for x in (mask, reset))
    h, state = slstm(
        ops.expand_dims(gates, 1),
        recurrent_kernel,
        bias,
        initial_state=state,
        mask=mask,
        reset=reset,
        recurrent_scale=recurrent_scale,
        return_state=True,
    )
    return ops.squeeze(h, 1), state


def slstm_zero_state(batch_size, num_heads, head_dim):
    """The state before the first step, float32: h, c, n and m, all zero."""
    check_positive_int(num_heads=num_heads, head_dim=head_dim)
    return tuple(ops.zeros((batch_size, num_heads, head_dim), dtype="float32") for _ in range(4))


def prepare(
    gates,
    recurrent_kernel,
    bias,
    initial_state=None,
    mask=None,
    reset=None,
    recurrent_scale=None,
    return_state=False,
):
    """Checks the arguments of `slstm`, and turns them into those of a kernel."""
    gates = as_tensor("gates", gates)
    recurrent_kernel = as_tensor("recurrent_kernel", recurrent_kernel)
    bias = as_tensor("bias", bias)
    if recurrent_scale is not None:
        recurrent_scale = ops.cast(as_tensor("recurrent_scale", recurrent_scale), "float32")
    mask, reset = as_flags(mask=mask, reset=reset)
    check_shapes(
        gates=(gates, "B S 4 NH DH"),
        recurrent_kernel=(recurrent_kernel, "NH DH 4 DH"),
        bias=(bias, "4 NH DH"),
        mask=(mask, "B S"),
        reset=(reset, "B S"),
        recurrent_scale=(recurrent_scale, "B NH DH"),
    )
    NH, DH = gates.shape[3:]
    check_widths(NH=NH, DH=DH)
    if initial_state is None:
        state = slstm_zero_state(ops.shape(gates)[0], int(NH), int(DH))
    else:
        state = as_state(initial_state, dict.fromkeys("hcnm", (NH, DH)), gates.shape[0])
    if mask is not None and reset is not None:
        reset = ops.logical_and(reset, mask)
    recurrent_kernel, bias = (ops.cast(x, "float32") for x in (recurrent_kernel, bias))
    gates = bounded(gates)
    return (gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale), {}


def step(gates, recurrent_kernel, bias, state, recurrent_scale=None):
    """The recurrence at the head of this file, on (B, 4, NH, DH) and (B, NH, DH) in float32."""
    h, c, n, m = state
    if recurrent_scale is not None:
        h = h * recurrent_scale
    with exact():
        raw = gates + ops.einsum("bhd,hdge->bghe", h, recurrent_kernel) + bias
    i, f, z, o = ops.unstack(raw, 4, axis=1)
    log_f = ops.log_sigmoid(f)
    m_new = ops.where(n == 0, i, ops.maximum(i, log_f + m))
    # Where n == 0 the exponent has no bound, and what it scales is 0.
    F = ops.exp(ops.minimum(log_f + m - m_new, MAX_EXPONENT))
    I = ops.exp(i - m_new)
    c = F * c + I * ops.tanh(z)
    n = F * n + I
    return ops.sigmoid(o) * c / n, c, n, m_new


def slstm_scan(gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    def body(state, inputs):
        gates, *flags = inputs
        before = state
        if reset is not None:
            cleared = flags.pop()[..., None]
            state = tuple(ops.where(cleared, ops.zeros_like(x), x) for x in state)
        state = step(gates, recurrent_kernel, bias, state, recurrent_scale)
        if mask is not None:
            happens = flags.pop()[..., None]
            state = tuple(
                ops.where(happens, new, old) for new, old in zip(state, before, strict=True)
            )
        return state, state[0]

    flags = [x[..., None] for x in (mask, reset) if x is not None]
    inputs = (ops.cast(gates, "float32"), *flags)
    inputs = tuple(ops.swapaxes(x, 0, 1) for x in inputs)  # (S, B, ...)
    state, h = scan(body, state, inputs)
    return ops.swapaxes(h, 0, 1), state


kernels.define("slstm", prepare, nothing_given)
kernels.register("scan", slstm_scan, op="slstm", how=step_by_step)
