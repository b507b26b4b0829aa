"""The mLSTM, the sLSTM and the causal convolution in NumPy, one step after the other.

The equations of the papers and nothing else, to measure every other form against. Everything is
computed in the precision of the arguments: float64 for truth, float32 to see what float32 costs,
complex for derivatives. Comparisons ask the real part, so that an imaginary part of 1e-10 is
carried along as a derivative (the complex step).

A step that `mask` forbids does not happen at all, a `reset` at it included. A reset clears the
state before its step.
"""

import numpy as np


def mlstm(q, k, v, i, f, *, initial_state=None, mask=None, reset=None, eps=1e-6):
    """q, k (B, S, NH, DHQK), v (B, S, NH, DHHV), i, f (B, S, NH) -> h, (C, n, m)."""
    B, S, NH, DHQK = q.shape
    DHHV, dtype = v.shape[-1], np.result_type(q, k, v, i, f, *(initial_state or ()))
    shapes = (B, NH, DHQK, DHHV), (B, NH, DHQK), (B, NH)
    C, n, m = own_state(initial_state, shapes, dtype)
    h = np.zeros((B, S, NH, DHHV), dtype)
    for b, t in steps_that_happen(B, S, mask):
        if reset is not None and reset[b, t]:
            C[b], n[b], m[b] = 0, 0, 0
        log_f = log_sigmoid(f[b, t])
        m_new = maximum(log_f + m[b], i[b, t])
        scale = held(m_new)
        keep, write = np.exp(log_f + m[b] - scale), np.exp(i[b, t] - scale)
        kv = k[b, t, :, :, None] * v[b, t, :, None, :]
        C[b] = keep[:, None, None] * C[b] + write[:, None, None] * kv
        n[b] = keep[:, None] * n[b] + write[:, None] * k[b, t]
        m[b] = m_new
        scaled_q = q[b, t] / DHQK**0.5
        numerator = np.sum(C[b] * scaled_q[:, :, None], axis=1)
        denominator = maximum(absolute(np.sum(n[b] * scaled_q, axis=1)), largest_exp(-scale)) + eps
        h[b, t] = numerator / denominator[:, None]
    return h, (C, n, m)


def slstm(gates, recurrent_kernel, bias, *, initial_state=None, mask=None, reset=None):
    """gates (B, S, 4, NH, DH), kernel (NH, DH, 4, DH), bias (4, NH, DH) -> h, (h, c, n, m)."""
    B, S, _, NH, DH = gates.shape
    dtype = np.result_type(gates, recurrent_kernel, bias, *(initial_state or ()))
    h, c, n, m = own_state(initial_state, [(B, NH, DH)] * 4, dtype)
    outputs = np.zeros((B, S, NH, DH), dtype)
    for b, t in steps_that_happen(B, S, mask):
        if reset is not None and reset[b, t]:
            h[b], c[b], n[b], m[b] = 0, 0, 0, 0
        recurrent = np.sum(h[b][:, :, None, None] * recurrent_kernel, axis=1)  # (NH, 4, DH)
        i, f, z, o = gates[b, t] + recurrent.swapaxes(0, 1) + bias
        log_f = log_sigmoid(f)
        m_new = np.where(n[b] == 0, i, maximum(i, log_f + m[b]))
        scale = held(m_new)
        keep, write = largest_exp(log_f + m[b] - scale), np.exp(i - scale)
        c[b] = keep * c[b] + write * np.tanh(z)
        n[b] = keep * n[b] + write
        m[b] = m_new
        h[b] = outputs[b, t] = sigmoid(o) * c[b] / n[b]
    return outputs, (h, c, n, m)


def causal_conv1d(x, kernel, bias=None, *, initial_state=None, mask=None, reset=None):
    """x (B, S, D), kernel (K, D), bias (D,) -> y (B, S, D), the last K - 1 inputs that happened."""
    B, S, D = x.shape
    K = kernel.shape[0]
    given = [z for z in (x, kernel, bias, initial_state) if z is not None]
    dtype = np.result_type(*given)
    (state,) = own_state(
        None if initial_state is None else (initial_state,), [(B, K - 1, D)], dtype
    )
    y = np.zeros((B, S, D), dtype)
    for b, t in steps_that_happen(B, S, mask):
        if reset is not None and reset[b, t]:
            state[b] = 0
        window = np.concatenate([state[b], x[b, t : t + 1]])
        y[b, t] = np.sum(kernel * window, axis=0) + (0 if bias is None else bias)
        state[b] = window[1:]
    return y, state


def directional(f, inputs, direction, step=1e-10):
    """The derivative of the scalar `f(*inputs)` along `direction`, by complex step.

    Nothing is subtracted, so nothing is lost: exact up to step^2 and the inputs' precision.
    """
    moved = [x + 1j * step * d for x, d in zip(inputs, direction, strict=True)]
    return np.imag(f(*moved)) / step


class Lossy(np.ndarray):
    """With every result off at random by up to what float32 loses of its terms.

    `mlstm(*(x.view(Lossy) for x in inputs))`. One run in float32 may be exact by luck; where terms
    cancel, it often is.
    """

    share = 2.0**-24  # of each result that may be lost
    holds = False
    random = None

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        inputs = [x.view(np.ndarray) if isinstance(x, Lossy) else x for x in inputs]
        y = getattr(ufunc, method)(*inputs, **kwargs)
        if y.dtype == bool:
            return y
        if self.share:
            lost, lost_slope = self.random.uniform(-self.share, self.share, (2, *y.shape))
            slope = np.imag(y)
            if ufunc in (np.multiply, np.divide):  # that of a product, or quotient, has two terms
                (a, b), (c, d) = ((np.real(x), np.imag(x)) for x in inputs)
                slope = abs(a * d) + abs(b * c)
                slope = slope / c / c if ufunc is np.divide else slope
            y = y + lost * np.real(y)
            if np.iscomplexobj(y):
                y = y + 1j * lost_slope * slope
        return np.asarray(y).view(type(self))

    def __array_function__(self, function, types, args, kwargs):
        y = super().__array_function__(function, types, args, kwargs)
        return y.view(type(self)) if function is np.where else y


class LossyHeld(Lossy):
    """And with stabilizers as constants.

    They only scale, so that their derivative mostly cancels. A gradient written by hand may rely on
    that. The terms of its sums are then those that are left where stabilizers are constants.
    """

    holds = True


class Held(LossyHeld):
    """The same, and nothing is lost."""

    share = 0.0


def held(m):
    return m.real if getattr(m, "holds", False) else m


def steps_that_happen(B, S, mask):
    return [(b, t) for b in range(B) for t in range(S) if mask is None or mask[b, t]]


def own_state(initial_state, shapes, dtype):
    if initial_state is None:
        return [np.zeros(shape, dtype) for shape in shapes]
    return [np.array(x, dtype) for x in initial_state]


def maximum(x, y):
    return np.where(np.real(x) >= np.real(y), x, y)


def absolute(x):
    return np.where(np.real(x) >= 0, x, -x)


def largest_exp(x):
    """exp(x), or the most that the precision holds: for what is divided by, or multiplies 0."""
    most = np.log(np.finfo(x.dtype).max) - 1
    return np.exp(np.where(np.real(x) < most, x, most))


def log_sigmoid(x):
    return np.where(np.real(x) >= 0, 0, x) - np.log1p(np.exp(-absolute(x)))


def sigmoid(x):
    return np.exp(log_sigmoid(x))
