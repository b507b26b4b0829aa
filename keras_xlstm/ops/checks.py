"""Arguments are checked, alone and against each other, before anything is computed.

Each message has the rule, what came, after "Received:", and the way out where the rule is not one.
"""

import math
import numbers
from reprlib import repr  # cuts long values short

import keras
import numpy as np
from keras import ops

KINDS = {  # what a tensor is asked to be: how that is called, how its dtype's name may start
    "float": ("a float tensor", ("float", "bfloat")),
    "int": ("an int tensor", ("int", "uint")),
    "flag": ("a bool tensor", ("bool", "int", "uint", "float", "bfloat")),
}


def as_tensor(name, x, kind="float"):
    """An argument as a tensor of the backend.

    Args:
        name: string, of the argument.
        x: tensor, array, or numbers in lists.
        kind: string, one of `KINDS`. Of "flag", numbers are taken too, and 0 is `False`.

    Raises:
        ValueError: if it is nothing of that kind.
    """
    tensor = x
    if not hasattr(x, "dtype"):
        try:
            tensor = None if isinstance(x, (str, bytes, dict)) else ops.convert_to_tensor(x)
        except (TypeError, ValueError):
            tensor = None
    _check_kind(name, x, tensor, kind)
    tensor = ops.convert_to_tensor(tensor)
    return ops.cast(tensor, "bool") if kind == "flag" else tensor


def _check_kind(name, x, tensor, kind):
    """That `tensor`, which is `x` or made of it, is of a kind; `None` is of none."""
    rule, starts = KINDS[kind]
    try:
        fits = keras.backend.standardize_dtype(tensor.dtype).startswith(starts)
    except (AttributeError, ValueError):  # no tensor, or one of strings or objects
        fits = False
    if not fits:
        received = f"dtype {x.dtype}" if hasattr(x, "dtype") else f"{name}={repr(x)}"
        raise ValueError(f"`{name}` must be {rule}. Received: {received}.")


def check_ids(name, ids, size=None, ndim=2):
    """Checks token ids. What is on a device is not looked at, as that would wait for it.

    Args:
        name: string, of the argument.
        ids: int tensor, of which nothing but dtype and rank is checked; or array or list.
        size: int, of the vocabulary, or `None` where it is not known.
        ndim: int.

    Returns:
        `ids`, of a list as an array.

    Raises:
        ValueError: if they are no ids of the vocabulary.
    """
    array = ids
    if isinstance(ids, (list, tuple)):
        try:
            array = np.asarray(ids) if ids else np.zeros(0, "int32")
        except ValueError:  # rows of different lengths
            array = None
    _check_kind(name, ids, array, "int")
    if len(array.shape) != ndim:
        raise ValueError(
            f"`{name}` must have {'1 axis' if ndim == 1 else f'{ndim} axes'}. "
            f"Received: {name}.shape={tuple(array.shape)}."
        )
    if isinstance(array, np.ndarray) and array.size:
        bad = [id for id in (array.min(), array.max()) if id < 0 or (size and id >= size)]
        if bad:
            last = "on" if size is None else f"to {size - 1}"
            raise ValueError(
                f"`{name}` must be ids in the vocabulary, from 0 {last}. Received: {bad[0]}."
            )
    return array


def as_flags(**named):
    """Masks and resets as bool tensors, as far as they are given."""
    return [x if x is None else as_tensor(name, x, "flag") for name, x in named.items()]


def check_shapes(**named):
    """Checks tensors against layouts whose dimension names are shared.

    Args:
        **named: name of the argument = (tensor or `None`, layout such as `"B S NH DHQK"`).
            Dimensions with one name must agree; a number must be met. Sizes that are not yet
            known agree with everything.

    Raises:
        ValueError: names the first argument that does not fit, and what set the size.
    """
    sizes = {}
    for name, (tensor, layout) in named.items():
        if tensor is None:
            continue
        dims, shape = layout.split(), tuple(tensor.shape)
        problem = f"Received: {name}.shape={shape}."
        if len(dims) != len(shape):
            axes = "1 axis" if len(dims) == 1 else f"{len(dims)} axes"
            raise ValueError(f"`{name}` must have {axes}, ({', '.join(dims)}). {problem}")
        for dim, size in zip(dims, shape, strict=True):
            known, source = (int(dim), layout) if dim.isdigit() else sizes.get(dim, (None, None))
            if size is None:
                continue
            if known is None:
                sizes[dim] = size, name
            elif known != size:
                rule = "" if dim.isdigit() else f", and {dim} is {known} in `{source}`"
                raise ValueError(
                    f"`{name}` must have the shape ({', '.join(dims)}){rule}. {problem}"
                )


def check_state(state, shapes, batch_size, flat=False, name="initial_state"):
    """Checks a state that the caller hands in.

    Args:
        state: what came.
        shapes: dict, the name of each tensor to its shape without the batch.
        batch_size: int, or `None` where it is not known.
        flat: bool, whether a tensor may have any shape with as many numbers a row.
        name: string, of the argument.

    Raises:
        ValueError: if it is no list of such tensors.
    """
    if not isinstance(state, (list, tuple)):
        shape = tuple(getattr(state, "shape", ()))
        received = f"a tensor of shape {shape}" if shape else f"{name}={repr(state)}"
        _refuse_state(name, shapes, batch_size, received)
    if len(state) != len(shapes):
        _refuse_state(name, shapes, batch_size, f"{len(state)} of them")
    for x, (key, shape) in zip(state, shapes.items(), strict=True):
        if x is None or not hasattr(x, "shape"):
            _refuse_state(name, shapes, batch_size, f"{key}={repr(x)}")
        given = tuple(x.shape)
        if flat:
            row = given[1:]
            fits = len(given) > 1 and (None in row or math.prod(row) == math.prod(shape))
        else:
            fits = len(given) == 1 + len(shape) and not _differ(given[1:], shape)
        if not fits or _differ(given[:1], (batch_size,)):
            _refuse_state(name, shapes, batch_size, f"{key}.shape={given}")


def as_state(state, shapes, batch_size):
    """The same, and the state as float32 tensors."""
    check_state(state, shapes, batch_size)
    pairs = zip(shapes, state, strict=True)
    return tuple(ops.cast(as_tensor(name, x), "float32") for name, x in pairs)


def _refuse_state(name, shapes, batch_size, received):
    B = "B" if batch_size is None else batch_size
    wanted = [f"{key} ({', '.join(map(str, (B, *shape)))})" for key, shape in shapes.items()]
    raise ValueError(
        f"`{name}` must be a list of the tensors {', '.join(wanted)}, as return_state=True "
        f"returns them. Received: {received}."
    )


def _differ(shape, other):
    return any(None not in pair and pair[0] != pair[1] for pair in zip(shape, other, strict=True))


def check_positive_int(**named):
    _check(named, "be a positive integer", lambda x: is_int(x) and x >= 1)


def check_widths(**named):
    """Of shapes: while torch traces, for OpenVINO, they are tensors, which cannot be checked."""
    check_positive_int(**{name: x for name, x in named.items() if is_int(x)})


def check_number(**named):
    _check(named, "be a finite number", is_number)


def check_positive(**named):
    _check(named, "be a positive number", lambda x: is_number(x) and x > 0)


def check_not_negative(**named):
    _check(named, "be a finite number, 0 or larger", lambda x: is_number(x) and x >= 0)


def check_cap(**named):
    rule = "be a positive number, or None for no cap"
    _check(named, rule, lambda x: x is None or (is_number(x) and x > 0))


def check_rate(**named):
    _check(named, "lie in [0, 1)", lambda x: is_number(x) and 0 <= x < 1)


def _check(named, rule, fits):
    for name, value in named.items():
        if not fits(value):
            raise ValueError(f"`{name}` must {rule}. Received: {name}={repr(value)}.")


def check_kernel(kernel):
    """That a layer's `kernel` is a name. Whether there is one the call asks: it may be built under
    one backend and run under another."""
    if not (kernel is None or isinstance(kernel, str)):
        raise ValueError(f"`kernel` must be 'auto' or a kernel's name. Received: {kernel!r}.")


def check_divides(divisor_name, divisor, name, value, what="heads"):
    if value % divisor:
        fits = [d for d in range(1, value + 1) if value % d == 0]
        raise ValueError(
            f"`{divisor_name}` must divide `{name}`: {what} are equally wide. Received: "
            f"{divisor_name}={divisor}, {name}={value}. Divisors of {value}: {fits}."
        )


def given(**named):
    """Those that are not `None`."""
    return {name: value for name, value in named.items() if value is not None}


def is_int(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
