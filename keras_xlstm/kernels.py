"""Fast kernels: how one registers, how one is chosen, and why.

An operation of `keras_xlstm.ops` checks its arguments, turns masks and resets into gates, and
hands the rest to a kernel. The first kernel that has no objection, best first, serves the call:

```python
from keras_xlstm import kernels

def why_not(q, k, v, i, log_f, s, state, *, chunk_size, eps):
    if q.shape[-1] % 16:
        return f"needs DHQK in multiples of 16, received {q.shape[-1]}"

kernels.register("mine", my_mlstm, why_not, priority=20)
kernels.available()  # ["step", "mine", "xla", "chunkwise", "parallel", "recurrent"]
```

A package that ships kernels names a function that registers them in the entry-point group
`keras_xlstm.kernels`, under the name of the Keras backend that it serves. It is loaded at the
first dispatch under that backend, never under another. An error inside a kernel is an error:
nothing falls back once a kernel runs.

What a kernel of each operation receives and returns stands in `keras_xlstm/ops`: `mlstm.py` and
`slstm.py`.
"""

from __future__ import annotations

import contextlib
import numbers
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import keras

ENTRY_POINTS = "keras_xlstm.kernels"


@dataclass(frozen=True)
class Kernel:
    name: str
    run: Callable
    why_not: Callable
    how: Callable
    priority: int


_kernels: dict[str, dict[str, Kernel]] = {}  # op -> name -> kernel
_prepare: dict[str, Callable] = {}  # op -> public arguments to a kernel's
_is_empty: dict[str, Callable] = {}  # op -> whether a call computes nothing
_in_use: dict[str, str] = {}  # op -> name, where `use` has set one
_observers: list[Callable] = []
_loaded = False  # the kernels of other packages
_loading = threading.RLock()


def define(op, prepare, is_empty=None):
    """Declares an operation.

    Args:
        op: string, its name.
        prepare: callable, maps its public arguments to those of its kernels.
        is_empty: callable with the arguments of its kernels, whether there is nothing to compute,
            so that none is asked. `None` where there always is something.
    """
    _kernels[op], _prepare[op], _is_empty[op] = {}, prepare, is_empty or _nothing


def register(name, kernel, why_not=None, *, op="mlstm", priority=0, how=None):
    """Adds a kernel, or replaces the one of that name.

    Args:
        name: string, what `kernel=` and `use` call it.
        kernel: callable, with the arguments that `op` gives its kernels.
        why_not: callable with the same arguments. Returns what rules the call out, as a
            sentence to read after the kernel's name, or `None`. `None` for a kernel that serves
            every call.
        op: string, the operation that it computes: `"mlstm"` or `"slstm"`.
        priority: int, the highest is asked first. The forms in plain `keras.ops` stand at 0 and
            below, the single step at 100.
        how: callable with the arguments of `why_not`. Returns what the kernel chooses for the
            call, such as "in chunks of 64 steps", for `explain`.

    Raises:
        ValueError: if the name is no other string than `"auto"`, or what is to be called cannot be.
    """
    if not isinstance(name, str) or name in ("", "auto"):
        raise ValueError(f"`name` must be a string, and not 'auto'. Received: name={name!r}.")
    _check_callable(kernel=kernel, why_not=why_not or _nothing, how=how or _nothing)
    if not isinstance(priority, numbers.Real):
        raise ValueError(f"`priority` must be a number. Received: priority={priority!r}.")
    _kernels_of(op, load=False)[name] = Kernel(
        name, kernel, why_not or _nothing, how or _nothing, priority
    )


def available(op="mlstm"):
    """Names of the kernels of `op` under the active backend, best first."""
    return [kernel.name for kernel in _best_first(op)]


def explain(*args, op="mlstm", kernel="auto", **kwargs):
    """Says which kernel would serve a call, and why not the others. Computes nothing.

    Args:
        *args, **kwargs: the arguments of the operation.
        op: string, `"mlstm"` or `"slstm"`.
        kernel: as for the operation.

    Returns:
        A string, one line a kernel, best first: for the one that serves the call, marked with
        `*`, in which form and sizes; for each other what speaks against it.

    Raises:
        ValueError: as the operation does, of arguments that do not fit.

    Example:

    ```python
    q = k = v = keras.random.normal((2, 100, 4, 16))
    i = f = keras.random.normal((2, 100, 4))
    print(kernels.explain(q, k, v, i, f))
    ```
    """
    call_args, call_kwargs = _prepare_of(op)(*args, **kwargs)
    forced, chosen, lines = check_name(op, kernel), None, []
    is_empty = _is_empty[op](*call_args, **call_kwargs)
    for candidate in _best_first(op):
        objection = None if is_empty else candidate.why_not(*call_args, **call_kwargs)
        if is_empty:
            verdict = "not asked: there is nothing to compute"
        elif forced and candidate.name != forced:
            verdict = f"not asked: `{forced}` is forced"
        elif objection:
            verdict = objection
        elif chosen:
            verdict = f"could serve it, after `{chosen}`"
        else:
            chosen, verdict = candidate.name, "serves this call"
            if how := candidate.how(*call_args, **call_kwargs):
                verdict += f", {how}"
        mark = "*" if candidate.name == chosen else "-"
        lines.append(f"{mark} {candidate.name}: {verdict}")
    if not (chosen or is_empty):
        lines.append("! none can serve this call, which is an error")
    inputs = ", ".join(
        f"{tuple(x.shape)} {keras.backend.standardize_dtype(x.dtype)}"
        for x in call_args
        if hasattr(x, "shape")
    )
    return "\n".join([f"{op} on {keras.backend.backend()}, inputs {inputs}", *lines])


class use:
    """Forces a kernel for every call that leaves the choice open; `"auto"` frees it again.

    A setter, and a context manager that puts back what was set before. It holds for the whole
    process, and for a compiled function at the time when that is traced.

    Args:
        name: string, a name from `available(op)`, or `"auto"`.
        op: string, `"mlstm"` or `"slstm"`.

    Example:

    ```python
    with kernels.use("recurrent"):
        slow_but_plain = model.predict(x)
    ```
    """

    def __init__(self, name, op="mlstm"):
        self.op, self.before = op, _in_use.get(op, "auto")
        _kernels_of(op)
        _in_use[op] = name if name == "auto" else _named(op, name).name

    def __enter__(self):
        return self

    def __exit__(self, *_):
        _in_use[self.op] = self.before


@contextlib.contextmanager
def observe(observer):
    """Calls `observer(op, args)`, args those of a kernel, before each call that a kernel serves.

    It is for looking inside, as `keras_xlstm.inspect` does. A compiled function is observed while
    it is traced.

    Args:
        observer: callable.

    Example:

    ```python
    with kernels.observe(lambda op, args: print(op)):
        model(x)
    ```
    """
    _check_callable(observer=observer)
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def choose(op, kernel, args, kwargs):
    """The kernel that serves this call, or `None` where there is nothing to compute.

    Raises:
        ValueError: if the forced kernel is unknown or cannot serve the call, or none can.
    """
    if _is_empty[op](*args, **kwargs):
        return None
    forced = check_name(op, kernel)
    candidates = [_named(op, forced)] if forced else _best_first(op)
    objections = []
    for candidate in candidates:
        objection = candidate.why_not(*args, **kwargs)
        if objection is None:
            for observer in _observers:
                observer(op, args)
            return candidate
        objections.append(f"`{candidate.name}` {objection}")
    asked = f"`kernel={forced!r}` was asked for" if forced else "every kernel was asked"
    way_out = ' Pass kernel="auto" to let another serve it.' if forced else ""
    raise ValueError(
        f"No kernel can serve this {op} call; {asked}: {', '.join(objections)}.{way_out}"
    )


def check_name(op, kernel):
    """The name of the kernel that is forced by `kernel` or `use`, or `None`.

    Raises:
        ValueError: if there is no such kernel.
    """
    name = _in_use.get(op, "auto") if kernel in (None, "auto") else kernel
    return None if name == "auto" else _named(op, name).name


def _named(op, name):
    kernels = _kernels_of(op)
    if not isinstance(name, str) or name not in kernels:
        raise ValueError(
            f"`kernel` must be 'auto' or name a kernel of {op} that is registered for the "
            f"{keras.backend.backend()} backend: {available(op)}. Received: kernel={name!r}."
        )
    return kernels[name]


def _best_first(op):
    return sorted(_kernels_of(op).values(), key=lambda kernel: -kernel.priority)


def _kernels_of(op, load=True):
    if load:
        _load_entry_points()
    if not isinstance(op, str) or op not in _kernels:
        raise ValueError(f"`op` must be one of {sorted(_kernels)}. Received: op={op!r}.")
    return _kernels[op]


def _prepare_of(op):
    _kernels_of(op)
    return _prepare[op]


def _load_entry_points():
    global _loaded
    if not _loaded:
        with _loading:  # another thread may be at it
            if not _loaded:
                name = keras.backend.backend()
                for entry_point in metadata.entry_points(group=ENTRY_POINTS, name=name):
                    entry_point.load()()
                _loaded = True


# A framework that traces a function runs this, and does not trace it.
if keras.backend.backend() == "torch":
    import torch

    _load_entry_points = torch.compiler.assume_constant_result(_load_entry_points)
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    _load_entry_points = tf.autograph.experimental.do_not_convert(_load_entry_points)


def _check_callable(**named):
    for name, value in named.items():
        if not callable(value):
            raise ValueError(f"`{name}` must be a function. Received: {name}={value!r}.")


def _nothing(*args, **kwargs):
    return None
