"""How the tensors of a checkpoint and the variables of a model correspond, and their exchange."""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import keras
import ml_dtypes
import numpy as np

from keras_xlstm.converters.safetensors import PIECE

LONG_LOAD = 2**30  # bytes, from where on a progress bar shows
TRIM_AFTER = 2**28  # bytes read, after which memory is given back
SHOWN = 5  # problems in an error message


class Layout(NamedTuple):
    """Two functions of arrays: ours -> theirs, and (theirs, our shape) -> ours."""

    theirs: Callable
    ours: Callable


SAME = Layout(lambda x: x, lambda x, shape: x)
TRANSPOSED = Layout(lambda x: x.T, lambda x, shape: x.T)  # torch keeps (out, in), Keras (in, out)
FLAT = Layout(lambda x: x.reshape(-1), lambda x, shape: x.reshape(shape))


class Weight:
    """A tensor of a checkpoint, and the variables that it holds, one behind the other.

    Args:
        key: str, its name in the checkpoint.
        *parts: (layer, name of the layer's variable, `Layout`).
    """

    def __init__(self, key, *parts):
        self.key, self.parts = key, parts

    @property
    def shapes(self):
        """The shape of each part, as the checkpoint lays it out."""
        # An array of stride 0 has any shape and no size.
        return [
            layout.theirs(np.broadcast_to(np.float32(0), getattr(layer, name).shape)).shape
            for layer, name, layout in self.parts
        ]

    @property
    def shape(self):
        first, *_ = shapes = self.shapes
        return (sum(shape[0] for shape in shapes), *first[1:])

    @property
    def dtype(self):
        """The dtype that the numbers will have here."""
        variables = [getattr(layer, name) for layer, name, _ in self.parts]
        names = {keras.backend.standardize_dtype(variable.dtype) for variable in variables}
        return np.result_type(*map(np.dtype, names))

    def assign(self, x):
        rows = np.cumsum([shape[0] for shape in self.shapes])[:-1]
        for (layer, name, layout), part in zip(self.parts, np.split(x, rows), strict=True):
            variable = getattr(layer, name)
            variable.assign(layout.ours(part, tuple(variable.shape)))

    def value(self, dtype):
        parts = []
        for layer, name, layout in self.parts:
            x = keras.ops.convert_to_numpy(getattr(layer, name))
            if not keras.backend.is_float_dtype(x.dtype.name):
                raise ValueError(
                    f"A quantized model cannot be converted: `{layer.path}/{name}` is {x.dtype}. "
                    "Convert it first and quantize then."
                )
            parts.append(layout.theirs(x).astype(dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def load(weights, tensors, source):
    """Fills a model from a checkpoint, tensor by tensor, once all of them are known to fit.

    Args:
        weights: list of `Weight`s.
        tensors: dict from key to `StoredTensor`, or what else has its attributes.
        source: str, what decided on the shapes of the model, for errors.

    Raises:
        ValueError: before anything is assigned if keys or shapes do not fit; as soon as it is
            found if a tensor holds NaN or infinity.
    """
    check(weights, tensors, source)
    by_key = {weight.key: weight for weight in weights}
    nbytes = sum(x.nbytes for x in tensors.values())
    progress = keras.utils.Progbar(len(tensors), unit_name="tensor", verbose=nbytes >= LONG_LOAD)
    freed = nbytes  # by now: what the variables were drawn with needed room of its own
    for key, tensor in tensors.items():  # in the order of the files: each is read once, forwards
        if freed >= TRIM_AFTER:
            trim_memory()
            freed = 0
        dtype = by_key[key].dtype
        with np.errstate(over="ignore"):  # what is beyond its range becomes infinite
            x = tensor.read(dtype)
        if not all_finite(x):
            raise ValueError(
                f'{tensor.file}: "{key}" of shape {tensor.shape} holds NaN or infinity'
                f"{' as ' + dtype.name if dtype != tensor.dtype else ''}, so it cannot come from a "
                "sound training. The model was not loaded."
            )
        by_key[key].assign(x)
        del x  # before the next one comes
        freed += tensor.nbytes
        progress.add(1)
    if nbytes >= TRIM_AFTER:
        trim_memory()


def trim_memory():
    """Gives what was freed back to the system.

    The C library of Linux keeps it for each thread apart, up to as much again as a model takes.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # other C libraries give it back by themselves
            ctypes.CDLL(None).malloc_trim(0)


def check_room(tensors, embedding, shape, num_layers, source):
    """Raises `ValueError` where a model is so large that the tensors cannot be all of it.

    `check` would find that too, but only after the memory of such a model has been asked for.

    Args:
        tensors: dict, as for `load`.
        embedding: str, the key of the embedding, or `None` where there is none.
        shape: its shape in the model.
        num_layers: int, blocks of the model.
        source: str, what decided on these, for errors.
    """
    x = tensors.get(embedding)
    size = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if x is not None and x.shape != shape and math.prod(shape) > size:
        raise ValueError(
            f"The checkpoint does not fit {source}. Nothing was loaded.\n"
            f'{x.file}: "{embedding}" has the shape {x.shape}, and the model of {source} needs '
            f"{shape}."
        )
    if num_layers > len(tensors):
        files = ", ".join(dict.fromkeys(x.file for x in tensors.values())) or "the checkpoint"
        raise ValueError(
            f"The checkpoint does not fit {source}. Nothing was loaded.\n"
            f"{files}: the model of {source} needs the tensors of {num_layers} blocks. Received: "
            f"{len(tensors)} tensors."
        )


def check(weights, tensors, source):
    """Raises `ValueError` unless each tensor has its place and each weight its tensor."""
    wanted = {weight.key: weight.shape for weight in weights}
    files = ", ".join(dict.fromkeys(x.file for x in tensors.values())) or "the checkpoint"
    problems = [
        f'{x.file}: "{key}" has the shape {x.shape}, and the model of {source} needs {wanted[key]}.'
        for key, x in tensors.items()
        if key in wanted and x.shape != wanted[key]
    ]
    problems += [
        f'{files}: "{key}" is missing; the model of {source} needs it with the shape {shape}.'
        for key, shape in wanted.items()
        if key not in tensors
    ]
    problems += [
        f'{x.file}: "{key}" of shape {x.shape} is not a weight of the model of {source}, which has '
        "no place for it."
        for key, x in tensors.items()
        if key not in wanted
    ]
    if problems:
        more = len(problems) - SHOWN
        shown = problems[:SHOWN] + ([f"... and {more} more."] if more > 0 else [])
        raise ValueError(
            f"The checkpoint does not fit {source}. Nothing was loaded.\n" + "\n".join(shown)
        )


def shards(weights, dtype, max_bytes):
    """Cuts a list of `Weight`s into lists of at most `max_bytes` each, or of one weight."""
    lists, size = [[]], 0
    for weight in weights:
        nbytes = math.prod(weight.shape) * dtype.itemsize
        if lists[-1] and size + nbytes > max_bytes:
            lists.append([])
            size = 0
        lists[-1].append(weight)
        size += nbytes
    return lists


def all_finite(x):
    """Whether an array holds neither NaN nor infinity; looks at a piece at a time."""
    x = x.reshape(-1)
    return all(np.isfinite(x[i : i + PIECE]).all() for i in range(0, x.size, PIECE))


def equal(a, b, rows=1024):
    """Whether two tensors of a checkpoint are equal; reads them a few rows at a time."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = a.view(), b.view()
    return all(np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, len(a), rows))


def as_array(x):
    """A tensor of any framework, also torch's bfloat16, which NumPy does not know."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        if str(x.dtype) == "torch.bfloat16":
            return x.float().numpy().astype(ml_dtypes.bfloat16)
        return x.numpy()
    return keras.ops.convert_to_numpy(x)
