"""Looks inside: gates, stabilizer and states of every recurrent layer of a model, step by step.

`trace` runs a model once and returns a `Trace` for each of its sLSTMs and mLSTMs, NumPy arrays to
plot or to measure: how long a head remembers (`half_life`), how much of its matrix it uses
(`effective_rank`). `examples/look_inside.py` draws them.

    q, k, v, gates, state      what the layer gave its kernel, float32
    i, log_f, m, h, c, C, n    from them by the definitions in `keras_xlstm/ops`, float64
"""

from dataclasses import dataclass, field

import keras
import numpy as np

from keras_xlstm import kernels
from keras_xlstm.layers import MLSTM, SLSTM, MLSTMBlock, SLSTMBlock
from keras_xlstm.ops.checks import repr
from keras_xlstm.ops.mlstm import NEVER

_WATCHED = (MLSTM, SLSTM, MLSTMBlock, SLSTMBlock)


@dataclass(frozen=True)
class Trace:
    """What one recurrent layer did over B sequences of S steps.

    Arrays are float64, in the order in which the layer read: from the end with `go_backwards`. An
    mLSTM has one gate a head, (B, S, NH), an sLSTM one a unit, (B, S, NH, DH): `...` below.

    Attributes:
        name: string, the layer's path in the model.
        kind: `"mlstm"` or `"slstm"`.
        i: (B, S, ...), the input gate's pre-activation, in nats, after the soft cap and, in the
            sLSTM, with bias and memory mixing: a step writes with the weight `exp(i)`. -inf where
            a step did not happen.
        log_f: (B, S, ...), the logarithm of the forget gate, in nats, at most 0: a step keeps the
            share `exp(log_f)` of what was there. -inf at a reset, 0 where a step did not happen.
        m: (B, S, ...), the stabilizer after each step, in nats: what the state holds is smaller
            by `exp(m)` than what was written.
        happens: bool, (B, S), `False` at masked steps.
        reset: bool, (B, S), where the state was cleared before the step.
    """

    name: str
    kind: str
    i: np.ndarray
    log_f: np.ndarray
    m: np.ndarray
    happens: np.ndarray
    reset: np.ndarray
    _inputs: tuple = field(repr=False)

    def states(self, steps=None):
        """The states after some steps, as `return_state=True` gives the one after the last.

        Args:
            steps: ints, from 0 to S - 1, or from -S to -1. `None` for all of them: a matrix
                memory a step and head, so mind the size.

        Returns:
            The tuple C (B, T, NH, DHQK, DHHV), n (B, T, NH, DHQK), m (B, T, NH) of an mLSTM, or
            h, c, n and m (B, T, NH, DH) of an sLSTM, float64, where T is the number of steps.

        Raises:
            IndexError: if there is no such step.

        Example:

        ```python
        layer = keras_xlstm.layers.MLSTM(8, num_heads=2)
        (trace,) = keras_xlstm.inspect.trace(layer, keras.random.normal((2, 10, 4)))
        C, n, m = trace.states(steps=[4, -1])  # (2, 2, 2, 2, 4), (2, 2, 2, 2), (2, 2, 2)
        ```
        """
        S = self.happens.shape[1]
        steps = np.arange(S) if steps is None else np.arange(S)[_steps(steps, S)]
        if self.kind == "slstm":
            return tuple(x[:, steps] for x in self._inputs)
        k, v, state = self._inputs
        return _mlstm_states(k, v, self.i, self.log_f, self.m, state, steps)

    def half_life(self):
        """`half_life` of each head (NH,), or unit (NH, DH), over all steps that happened."""
        happens = np.broadcast_to(_like(self.happens, self.log_f), self.log_f.shape)
        return half_life(np.where(happens, self.log_f, np.nan), axis=(0, 1))


def trace(layer, inputs, **kwargs):
    """Runs a model or layer once, and returns what its recurrent layers did.

    Masks, resets and initial states count as they do in the call. Nothing is changed: layers with
    `stateful=True` get their states back.

    Args:
        layer: a model or layer with `MLSTM`, `SLSTM`, or blocks with those anywhere inside: a
            functional or sequential model, an `XLSTMBlockStack`, an `XLSTMCausalLM`, ...
        inputs: what it is called with. For a language model what its preprocessor makes of texts:
            `lm.preprocessor.generate_preprocess(texts)`.
        **kwargs: further call arguments, such as `mask`, `reset` and `initial_state`.

    Returns:
        A list of `Trace`, one for every call of a recurrent layer, in the order of the calls.

    Raises:
        ValueError: if no such layer was called. Cells inside `keras.layers.RNN` are not seen.

    Source: the definitions at the head of `keras_xlstm/ops/mlstm.py` and `slstm.py`.

    Example:

    ```python
    stack = keras_xlstm.layers.XLSTMBlockStack(num_blocks=2, num_heads=2, slstm_at=(1,))
    mlstm, slstm = keras_xlstm.inspect.trace(stack, keras.random.normal((1, 20, 32)))
    mlstm.m  # (1, 20, 2)
    slstm.half_life()  # (2, 16), in steps
    C, n, m = mlstm.states([9, 19])
    keras_xlstm.inspect.effective_rank(C)  # (1, 2, 2)
    ```
    """
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(f"`layer` must be a model or a layer. Received: {layer!r}.")
    if not layer.built:
        layer(inputs, **kwargs)
    calls, traces = [], []

    def observe(op, args):
        if calls and op in _READERS:
            traces.append(_READERS[op](calls[-1].path, *args))

    def watched(layer, call):
        def run(*args, **kwargs):
            calls.append(layer)
            try:
                return call(*args, **kwargs)
            finally:
                calls.pop()

        return run

    layers = [x for x in layer._flatten_layers() if isinstance(x, _WATCHED)]
    stateful = [x for x in layers if getattr(x, "stateful", False)]
    before = [[_numpy(v) for v in x.states] for x in stateful]
    try:
        for x in layers:
            vars(x)["call"] = watched(x, x.call)  # hides the method of the class
        with kernels.observe(observe):
            layer(inputs, **kwargs)
    finally:
        for x in layers:
            vars(x).pop("call", None)
        for x, values in zip(stateful, before, strict=True):
            for variable, value in zip(x.states, values, strict=True):
                variable.assign(value)
    if not traces:
        raise ValueError(
            "`layer` must call a layer among MLSTM, SLSTM, MLSTMBlock, SLSTMBlock, or one that "
            f"holds them. Received: {layer.name}, with {len(layers)} of them."
        )
    return traces


def half_life(log_f, axis=None):
    """After how many steps half is left of what a memory holds, at its average rate.

        ln(1/2) / mean(log_f)

    Args:
        log_f: array, logarithms of forget gates, in nats, as in `Trace.log_f`. What is not finite,
            such as -inf at a reset, does not count.
        axis: int or ints, over which to average. `None` for all.

    Returns:
        Array of float64, in steps: inf where nothing is forgotten, NaN where no step counts.

    Example:

    ```python
    keras_xlstm.inspect.half_life(np.log([0.5, 0.5, 0.5]))  # 1.0
    keras_xlstm.inspect.half_life(np.log([[0.9, 0.99]]), axis=0)  # [6.6, 69.0]
    ```
    """
    log_f = _array("log_f", log_f, 0)
    counts = np.isfinite(log_f)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(counts, log_f, 0).sum(axis) / counts.sum(axis)
        return np.log(2) / np.abs(mean)


def effective_rank(matrices):
    """How many directions matrices use: the exponential of the entropy of their singular values.

        exp(-sum(p ln p)),  p = singular values / their sum

    From 1, where one outer product fills the matrix, to its smaller side, where all directions
    are equally strong. It does not change when a matrix is scaled, so the stabilizer of `C` does
    not matter.

    Args:
        matrices: array, (..., rows, columns), such as C from `Trace.states`.

    Returns:
        Array of float64, (...): 0 for a matrix of zeros.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".

    Example:

    ```python
    keras_xlstm.inspect.effective_rank(np.eye(3))  # 3.0
    keras_xlstm.inspect.effective_rank(np.ones((5, 4, 3)))  # [1. 1. 1. 1. 1.]
    ```
    """
    sizes = np.linalg.svd(_array("matrices", matrices, 2, finite=True), compute_uv=False)
    total = sizes.sum(axis=-1, keepdims=True)
    p = sizes / np.where(total == 0, 1, total)
    entropy = -(p * np.log(np.where(p == 0, 1, p))).sum(axis=-1)
    return np.where(total[..., 0] == 0, 0, np.exp(entropy))


def _array(name, x, min_ndim, finite=False):
    try:
        array = np.asarray(x, "float64")
    except (TypeError, ValueError):
        array = None
    if x is None or array is None or array.ndim < min_ndim:
        axes = f" with at least {min_ndim} axes" if min_ndim else ""
        raise ValueError(f"`{name}` must be an array of numbers{axes}. Received: {repr(x)}.")
    if finite and not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite. Received: NaN or infinity among them.")
    return array


def _steps(steps, S):
    indices = np.array(steps, ndmin=1)
    if indices.size and indices.dtype.kind not in "iu":
        raise ValueError(f"`steps` must be integers, or None for all. Received: {repr(steps)}.")
    if indices.size and not (indices.min() >= -S and indices.max() < S):
        raise IndexError(f"`steps` must lie in [-{S}, {S - 1}]. Received: {repr(steps)}.")
    return indices.astype("int64")


def _trace_mlstm(name, q, k, v, i, log_f, s, state):
    """From the arguments of a kernel of the mLSTM, in which masks and resets are gates."""
    k, v, i, log_f, s = map(_numpy, (k, v, i, log_f, s))
    state = tuple(map(_numpy, state))
    happens, reset = (s > NEVER / 2).any(axis=-1), (log_f < NEVER / 2).any(axis=-1)
    i, log_f, s = (np.where(x < NEVER / 2, -np.inf, x) for x in (i, log_f, s))
    m, now = np.empty_like(i), state[2]
    for t in range(i.shape[1]):
        m[:, t] = now = np.maximum(log_f[:, t] + now, s[:, t])
    return Trace(name, "mlstm", i, log_f, m, happens, reset, (k, v, state))


def _mlstm_states(k, v, i, log_f, m, state, steps):
    """C, n and m after `steps`: the recurrence, of which those steps are kept."""
    C, n, m_before = state
    B, NH, DHQK, DHHV = C.shape
    C_kept, n_kept = np.empty((B, len(steps), NH, DHQK, DHHV)), np.empty((B, len(steps), NH, DHQK))
    for t in range(max(steps, default=-1) + 1):
        keep = np.exp(log_f[:, t] + m_before - m[:, t])[..., None]
        bk = np.exp(i[:, t] - m[:, t])[..., None] * k[:, t]
        C = keep[..., None] * C + bk[..., None] * v[:, t, :, None, :]
        n, m_before = keep * n + bk, m[:, t]
        C_kept[:, steps == t], n_kept[:, steps == t] = C[:, None], n[:, None]
    return C_kept, n_kept, m[:, steps]


def _trace_slstm(name, gates, recurrent_kernel, bias, state, mask, reset, recurrent_scale):
    """From the arguments of a kernel of the sLSTM. Its gates need the outputs, so all is run."""
    gates, R, bias = map(_numpy, (gates, recurrent_kernel, bias))
    B, S, _, NH, DH = gates.shape
    happens = np.ones((B, S), bool) if mask is None else _numpy(mask) > 0
    reset = np.zeros((B, S), bool) if reset is None else _numpy(reset) > 0
    state = np.stack([_numpy(x) for x in state])  # h, c, n, m
    scale = 1 if recurrent_scale is None else _numpy(recurrent_scale)
    i_kept, log_f_kept, states = np.empty((B, S, NH, DH)), np.empty((B, S, NH, DH)), []
    for t in range(S):
        fresh = np.where(reset[:, t, None, None], 0, state)
        h, c, n, m = fresh
        raw = gates[:, t] + np.einsum("bhd,hdge->bghe", scale * h, R) + bias
        i, f, z, o = raw.swapaxes(0, 1)
        log_f = -np.logaddexp(0, -f)
        m_new = np.where(n == 0, i, np.maximum(i, log_f + m))
        keep = np.where(n == 0, 0, np.exp(np.minimum(log_f + m - m_new, 0)))
        write = np.exp(i - m_new)
        c, n = keep * c + write * np.tanh(z), keep * n + write
        h = c / n / (1 + np.exp(-o))
        now = happens[:, t, None, None]
        state = np.where(now, np.stack([h, c, n, m_new]), state)
        i_kept[:, t] = np.where(now, i, -np.inf)
        cleared = reset[:, t, None, None]
        log_f_kept[:, t] = np.where(now, np.where(cleared, -np.inf, log_f), 0)
        states.append(state)
    states = tuple(np.stack(states, axis=2))  # each (B, S, NH, DH)
    return Trace(name, "slstm", i_kept, log_f_kept, states[3], happens, reset, states)


_READERS = {"mlstm": _trace_mlstm, "slstm": _trace_slstm}


def _numpy(x):
    return keras.ops.convert_to_numpy(keras.ops.cast(x, "float32")).astype("float64")


def _like(flags, x):
    """(B, S) -> (B, S, 1, ...), to go with x (B, S, ...)."""
    return flags.reshape(flags.shape + (1,) * (x.ndim - 2))
