"""The mLSTM: one step, and three forms over whole sequences that give the same numbers.

With `lf = logsigmoid(f)` and the state `(C, n, m)`, all zero at first (arXiv:2405.04517,
Sec. 2.3; numerics as in the 7B model, arXiv:2503.13427):

    m' = max(lf + m, i)                              stabilizer: the running maximum
    C' = exp(lf + m - m') C + exp(i - m') k v^T      matrix memory
    n' = exp(lf + m - m') n + exp(i - m') k          normalizer
    h  = (C'^T q / sqrt(DHQK)) / (max(|n'^T q| / sqrt(DHQK), exp(-m')) + eps)

Masks and resets become gates before any kernel runs, so that no kernel knows of them:

    a masked step   lf = 0,     i = s = NEVER           the state passes through
    a reset         lf = NEVER, s = max(i, logsigmoid(f))

where `s` is what a step offers to the stabilizer, `m' = max(lf + m, s)`: `i` everywhere but at a
reset, at which a fresh state would have offered `lf + 0` too.

A kernel of the operation "mlstm" is `kernel(q, k, v, i, log_f, s, state, *, chunk_size, eps)`.
q, k (B, S, NH, DHQK) and v (B, S, NH, DHHV) come in the compute dtype, i, log_f and s
(B, S, NH) and the state in float32, B and S >= 1, `chunk_size` an int or `None` for its own choice.
It returns h (B, S, NH, DHHV) in any float dtype and the next state in float32, and is
differentiable in every tensor that it takes.
"""

from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_xlstm import kernels
from keras_xlstm.ops.checks import (
    as_flags,
    as_state,
    as_tensor,
    check_not_negative,
    check_positive_int,
    check_shapes,
    check_widths,
    given,
)
from keras_xlstm.ops.products import exact
from keras_xlstm.ops.scan import scan

NEVER = -1e30  # log of a shut gate: exp(NEVER) is 0, and sums of many stay finite
GATE_LIMIT = 65504.0  # float16's largest; float32 hardly tells sums of larger gates apart
MAX_EXPONENT = 88.0  # exp(88) is the last power that float32 holds
CHUNK_SIZE = 64


def mlstm(
    q,
    k,
    v,
    i,
    f,
    *,
    initial_state=None,
    mask=None,
    reset=None,
    return_state=False,
    chunk_size=None,
    eps=1e-6,
    kernel="auto",
):
    """The mLSTM over a sequence, by the fastest kernel that can serve the call.

    Args:
        q, k: float tensors, (B, S, NH, DHQK), unscaled: q is scaled by DHQK^-1/2 at read time.
        v: float tensor, (B, S, NH, DHHV).
        i, f: float tensors, (B, S, NH): input and forget gate pre-activations, in nats. What lies
            beyond ±65504, infinity too, counts as ±65504.
        initial_state: C (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH). `None` for zeros.
        mask: bool tensor, (B, S). Where it is `False` the step does not happen, whatever `reset`
            says there: the state passes through unchanged, and h is 0.
        reset: bool tensor, (B, S). Where it is `True` the state is cleared before the step, as
            if a new sequence began.
        return_state: bool, whether to return the state after the last step.
        chunk_size: int, steps a chunk, in kernels that have chunks. `None` lets the kernel choose.
            It changes speed and memory, not the numbers.
        eps: float, not negative, added to the denominator.
        kernel: string, a name from `keras_xlstm.kernels.available()`, or `"auto"`.

    Returns:
        h, (B, S, NH, DHHV) in v's dtype; with `return_state` also the state `(C, n, m)`, float32,
        which is what `initial_state` takes to go on.

    Raises:
        ValueError: if shapes do not fit each other, or the kernel cannot serve the call.

    Source: Beck et al. 2024, arXiv:2405.04517, Eqs. 19-27; Beck et al. 2025, arXiv:2503.13427.

    Example:

    ```python
    q = k = v = keras.random.normal((2, 100, 4, 16))
    i = f = keras.random.normal((2, 100, 4))
    h = mlstm(q, k, v, i, f)
    h1, state = mlstm(q[:, :60], k[:, :60], v[:, :60], i[:, :60], f[:, :60], return_state=True)
    h2 = mlstm(q[:, 60:], k[:, 60:], v[:, 60:], i[:, 60:], f[:, 60:], initial_state=state)
    ```
    """
    args, kwargs = prepare(q, k, v, i, f, initial_state, mask, reset, return_state, chunk_size, eps)
    chosen = kernels.choose("mlstm", kernel, args, kwargs)
    if chosen is None or in_symbolic_scope():  # there, Keras asks for shapes and dtypes only
        h, state = ops.zeros_like(args[2]), args[-1]
    else:
        h, state = chosen.run(*args, **kwargs)
    h = ops.cast(h, args[2].dtype)
    if mask is not None:
        h = ops.where(ops.cast(mask, "bool")[:, :, None, None], h, ops.zeros_like(h))
    return (h, state) if return_state else h


def mlstm_recurrent(q, k, v, i, f, **kwargs):
    """`mlstm`, one step after the other: the definition. S steps in time, O(S) work."""
    return mlstm(q, k, v, i, f, kernel="recurrent", **kwargs)


def mlstm_parallel(q, k, v, i, f, **kwargs):
    """`mlstm`, all steps at once: O(S^2) work and memory. S must be known when it is traced."""
    return mlstm(q, k, v, i, f, kernel="parallel", **kwargs)


def mlstm_chunkwise(q, k, v, i, f, *, chunk_size=CHUNK_SIZE, **kwargs):
    """`mlstm`, parallel inside chunks and recurrent over them: O(S chunk_size) work."""
    return mlstm(q, k, v, i, f, kernel="chunkwise", chunk_size=chunk_size, **kwargs)


def mlstm_step(q, k, v, i, f, state, *, mask=None, reset=None, eps=1e-6):
    """One step of the mLSTM: the definition of every faster form, see the head of this file.

    Args:
        q, k: float tensors, (B, NH, DHQK), unscaled.
        v: float tensor, (B, NH, DHHV).
        i, f: float tensors, (B, NH), pre-activations in nats.
        state: C (B, NH, DHQK, DHHV), n (B, NH, DHQK), m (B, NH).
        mask, reset: bool tensors, (B,), as in `mlstm`.
        eps: float, added to the denominator.

    Returns:
        h, (B, NH, DHHV) in v's dtype, and the next state, float32.

    Raises:
        ValueError: if shapes do not fit each other.

    Example:

    ```python
    q = k = v = keras.random.normal((2, 4, 16))
    i = f = keras.random.normal((2, 4))
    h, state = mlstm_step(q, k, v, i, f, mlstm_zero_state(2, 4, 16, 16))
    ```
    """
    q, k, v, i, f = (as_tensor(*pair) for pair in zip("qkvif", (q, k, v, i, f), strict=True))
    mask, reset = as_flags(mask=mask, reset=reset)
    check_shapes(
        q=(q, "B NH DHQK"),
        k=(k, "B NH DHQK"),
        v=(v, "B NH DHHV"),
        i=(i, "B NH"),
        f=(f, "B NH"),
        mask=(mask, "B"),
        reset=(reset, "B"),
    )
    sequence = [ops.expand_dims(x, 1) for x in (q, k, v, i, f)]
    mask, reset = (x if x is None else ops.expand_dims(x, 1) for x in (mask, reset))
    h, state = mlstm(
        *sequence,
        initial_state=state,
        mask=mask,
        reset=reset,
        return_state=True,
        eps=eps,
    )
    return ops.squeeze(h, 1), state


def mlstm_zero_state(batch_size, num_heads, key_dim, value_dim):
    """The state before the first step, float32: C, n and m, all zero."""
    check_positive_int(num_heads=num_heads, key_dim=key_dim, value_dim=value_dim)
    lead = (batch_size, num_heads)
    shapes = lead + (key_dim, value_dim), lead + (key_dim,), lead
    return tuple(ops.zeros(shape, dtype="float32") for shape in shapes)


def prepare(
    q,
    k,
    v,
    i,
    f,
    initial_state=None,
    mask=None,
    reset=None,
    return_state=False,
    chunk_size=None,
    eps=1e-6,
):
    """Checks the arguments of `mlstm`, and turns them into those of a kernel."""
    q, k, v, i, f = (as_tensor(*pair) for pair in zip("qkvif", (q, k, v, i, f), strict=True))
    mask, reset = as_flags(mask=mask, reset=reset)
    check_shapes(
        q=(q, "B S NH DHQK"),
        k=(k, "B S NH DHQK"),
        v=(v, "B S NH DHHV"),
        i=(i, "B S NH"),
        f=(f, "B S NH"),
        mask=(mask, "B S"),
        reset=(reset, "B S"),
    )
    NH, DHQK, DHHV = q.shape[2], q.shape[3], v.shape[3]
    check_widths(NH=NH, DHQK=DHQK, DHHV=DHHV)
    check_positive_int(**given(chunk_size=chunk_size))
    check_not_negative(eps=eps)
    if initial_state is None:
        state = mlstm_zero_state(ops.shape(q)[0], int(NH), int(DHQK), int(DHHV))
    else:
        shapes = {"C": (NH, DHQK, DHHV), "n": (NH, DHQK), "m": (NH,)}
        state = as_state(initial_state, shapes, q.shape[0])
    i, log_f, s = masked_gates(i, f, mask, reset)
    return (q, k, v, i, log_f, s, state), dict(chunk_size=chunk_size, eps=eps)


def masked_gates(i, f, mask, reset):
    """Turns masks and resets into gates: i, log_f and s, (B, S, NH), float32."""
    i = s = bounded(ops.cast(i, "float32"))
    log_f = ops.log_sigmoid(bounded(ops.cast(f, "float32")))
    if reset is not None:
        at_reset = reset[:, :, None]
        s = ops.where(at_reset, ops.maximum(i, log_f), i)
        log_f = ops.where(at_reset, NEVER, log_f)
    if mask is not None:
        happens = mask[:, :, None]
        i, s = (ops.where(happens, x, NEVER) for x in (i, s))
        log_f = ops.where(happens, log_f, ops.zeros_like(log_f))
    return i, log_f, s


def bounded(gates):
    """Pre-activations without those, infinity among them, beside which others would be lost."""
    return ops.clip(gates, -GATE_LIMIT, GATE_LIMIT)


def step(q, k, v, i, log_f, s, state, eps):
    """The recurrence at the head of this file, on (B, NH, ...) in float32."""
    C, n, m = state
    m_old = log_f + m
    m_new = ops.maximum(m_old, s)
    a, b = ops.exp(m_old - m_new)[..., None], ops.exp(i - m_new)[..., None]
    bk = b * k
    C = a[..., None] * C + bk[..., :, None] * v[..., None, :]
    n = a * n + bk
    q = q * q.shape[-1] ** -0.5
    with exact():
        h = ops.squeeze(ops.matmul(q[..., None, :], C), -2)
    h = h / denominator(ops.sum(n * q, -1), m_new, eps)[..., None]
    return h, (C, n, m_new)


def denominator(nq, m, eps):
    """max(|n^T q|, exp(-m)) + eps, in float32 without overflow."""
    return ops.maximum(ops.abs(nq), ops.exp(ops.minimum(-m, MAX_EXPONENT))) + eps


def _single_step(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    inputs = (ops.cast(ops.squeeze(x, 1), "float32") for x in (q, k, v, i, log_f, s))
    h, state = step(*inputs, state, eps)
    return ops.expand_dims(h, 1), state


def _not_one_step(q, *args, **kwargs):
    return None if q.shape[1] == 1 else f"needs S = 1, received {q.shape[1]}"


def _recurrent(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    def body(state, inputs):
        h, state = step(*inputs, state, eps)
        return state, h

    inputs = (ops.cast(x, "float32") for x in (q, k, v, i, log_f, s))
    state, h = scan(body, state, tuple(ops.swapaxes(x, 0, 1) for x in inputs))
    return ops.swapaxes(h, 0, 1), state


def _parallel(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    return chunkwise(q, k, v, i, log_f, s, state, chunk_size=q.shape[1], eps=eps)


def _length_unknown(q, *args, **kwargs):
    if not isinstance(q.shape[1], int):
        return f"needs a length that is known when it is traced, received {q.shape[1]}"


def chunkwise(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    S = ops.shape(q)[1]
    L = chunk_size or CHUNK_SIZE
    if isinstance(S, int):
        L = min(L, S)
    num_chunks = (S + L - 1) // L  # ONNX would round -S / L the other way

    def chunks(x, fill=0.0):
        """(B, S, NH, ...) -> (chunks, B, NH, L, ...), a last partial chunk filled up."""
        x = ops.cast(x, "float32")
        shape = ops.shape(x)
        B, rest = shape[0], tuple(x.shape[2:])
        pad = num_chunks * L - S
        if not isinstance(pad, int) or pad:
            filling = ops.zeros((B, pad, *rest), dtype="float32") + fill
            x = ops.concatenate([x, filling], axis=1)
        x = ops.reshape(x, (B, num_chunks, L, *rest))
        return ops.transpose(x, (1, 0, 3, 2, *range(4, len(x.shape))))

    scale = q.shape[-1] ** -0.5
    B, NH, DHHV = ops.shape(q)[0], q.shape[2], v.shape[-1]
    q, k, v, log_f = chunks(q), chunks(k), chunks(v), chunks(log_f)
    i, s = chunks(i, NEVER), chunks(s, NEVER)

    # Inside a chunk: D[t, j] is what is left at step t of what step j wrote, in logarithms.
    decay = segment_sums(log_f)  # (chunks, B, NH, L, L)
    b = ops.cumsum(log_f, axis=-1)  # what is left at step t of the state at the chunk's start
    g = b[..., -1]
    D = decay + i[..., None, :]
    m_inner = ops.max(decay + s[..., None, :], axis=-1)

    # What each chunk adds to the state, at a stabilizer of its own.
    m_added = m_inner[..., -1]
    weight = ops.exp(D[..., -1, :] - m_added[..., None])  # (chunks, B, NH, L)
    weighted = weight[..., None] * k
    C_added = matmul(ops.swapaxes(weighted, -1, -2), v)
    n_added = ops.sum(weighted, axis=-2)

    def next_chunk(carry, added):
        C, n, m = carry
        C_added, n_added, m_added, log_f_sum = added
        m_new = ops.maximum(log_f_sum + m, m_added)
        old, new = ops.exp(log_f_sum + m - m_new)[..., None], ops.exp(m_added - m_new)[..., None]
        C = old[..., None] * C + new[..., None] * C_added
        return (C, old * n + new * n_added, m_new), carry

    state, (C, n, m) = scan(next_chunk, state, (C_added, n_added, m_added, g))

    # The outputs: from the same chunk, and from the state at its start.
    m_t = ops.maximum(b + m[..., None], m_inner)  # (chunks, B, NH, L)
    q = q * scale
    inner = matmul(q, ops.swapaxes(k, -1, -2)) * ops.exp(D - m_t[..., None])
    outer = ops.exp(b + m[..., None] - m_t)
    num = matmul(inner, v) + outer[..., None] * matmul(q, C)
    nq = ops.sum(inner, -1) + outer * ops.sum(q * n[..., None, :], -1)
    h = num / denominator(nq, m_t, eps)[..., None]
    h = ops.reshape(ops.transpose(h, (1, 0, 3, 2, 4)), (B, num_chunks * L, NH, DHHV))
    return h[:, :S], state


def _in_chunks(q, *args, chunk_size, **kwargs):
    L, S = chunk_size or CHUNK_SIZE, q.shape[1]
    return f"in chunks of {min(L, S) if isinstance(S, int) else L} steps"


def matmul(x, y):
    """`ops.matmul` with one leading axis inside: LiteRT has no products of more than four axes."""
    with exact():
        flat = ops.matmul(*(ops.reshape(a, (-1, *a.shape[-2:])) for a in (x, y)))
    return ops.reshape(flat, (*ops.shape(x)[:-2], x.shape[-2], y.shape[-1]))


def segment_sums(x):
    """(..., L) -> (..., L, L): [t, j] is the sum of x over j < l <= t; NEVER where j > t.

    Each sum holds only its own terms. A difference of two cumulative sums would lose the small
    ones beside a large one, and all of them behind a reset.
    """
    L = x.shape[-1]
    after = ops.arange(L)[:, None] > ops.arange(L)[None, :]  # [l, j]: l > j
    x = ops.where(after, x[..., None], ops.zeros_like(x[..., None]))
    sums = ops.cumsum(x, axis=-2)
    return ops.where(ops.transpose(after), NEVER, sums)


def _at_once(q, *args, **kwargs):
    return f"all {q.shape[1]} steps at once"


def nothing_given(sequence, *args, **kwargs):
    """Whether there is no row, or no step."""
    return 0 in sequence.shape[:2]


def step_by_step(sequence, *args, **kwargs):
    return f"step by step, S = {sequence.shape[1]}"


kernels.define("mlstm", prepare, nothing_given)
kernels.register("step", _single_step, _not_one_step, priority=100, how=lambda *_, **__: "one step")
kernels.register("chunkwise", chunkwise, priority=0, how=_in_chunks)
kernels.register("parallel", _parallel, _length_unknown, priority=-10, how=_at_once)
kernels.register("recurrent", _recurrent, priority=-20, how=step_by_step)
