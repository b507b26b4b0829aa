"""Safetensors files, one tensor at a time: reading, checking and writing them needs NumPy alone.

    8 bytes, the length of the header | header, JSON | the numbers, row by row, little-endian
    header: {key: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Nothing in such a file is ever executed. The whole header is checked before any number is read.
"""

import json
import math
import os

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
PIECE = 2**22  # numbers that are converted, or looked at, at a time
PICKLES = (b"PK\x03\x04", b"\x80")  # how files of `torch.save` and of `pickle` begin
PICKLE_ADVICE = (
    "A pickle can run code while it is opened, so it never is. If you trust it, save it anew: "
    "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')."
)


class StoredTensor:
    """A tensor in a file, of which only the header has been read.

    Args:
        path: str, the file.
        key: str, the tensor's name in it.
        dtype: NumPy dtype.
        shape: tuple of ints.
        offset: int, where in the file it begins.
    """

    def __init__(self, path, key, dtype, shape, offset):
        self.path, self.key, self.dtype, self.shape = path, key, dtype, shape
        self.offset = offset
        self.file = os.path.basename(path)
        self.nbytes = dtype.itemsize * math.prod(shape)

    def read(self, dtype=None):
        """The numbers, as a new array; of another `dtype`, without two copies at a time."""
        x = np.empty(math.prod(self.shape), dtype or self.dtype)
        with open(self.path, "rb") as f:
            f.seek(self.offset)
            for start in range(0, x.size, PIECE):
                count = min(PIECE, x.size - start)
                x[start : start + count] = np.fromfile(f, self.dtype, count)
        return x.reshape(self.shape)

    def view(self):
        """The numbers where they are, in the file."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def read_header(path):
    """The tensors of a safetensors file: a dict from key to `StoredTensor`, as they lie in it.

    Raises:
        ValueError: if the file is not whole, or not of this format.
    """
    file, size = os.path.basename(path), os.path.getsize(path)
    with open(path, "rb") as f:
        start, brace = f.read(8), f.read(1)
        if start.startswith(PICKLES) and brace != b"{":  # a header of 128 bytes begins like one
            raise ValueError(f"{file} is a pickle under the name of safetensors. {PICKLE_ADVICE}")
        data = 8 + int.from_bytes(start, "little")
        if len(start) < 8 or data > size:
            raise ValueError(
                f"{file} is cut off, or not a safetensors file: its header should end at byte "
                f"{data}. Received: {size} bytes. Copy or download it again."
            )
        try:
            header = json.loads(brace + f.read(max(data - 9, 0)), object_pairs_hook=_without_twins)
            header.pop("__metadata__", None)
            fields = {
                key: (str(x["dtype"]), _whole(x["shape"]), _whole(x["data_offsets"]))
                for key, x in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(
                f"{file} is not a safetensors file: its header is broken ({e})."
            ) from e
    end = data + max((max(offsets, default=0) for _, _, offsets in fields.values()), default=0)
    if end != size:
        state = "is cut off" if end > size else "has bytes that its header does not tell of"
        raise ValueError(
            f"{file} {state}: the tensors in its header end at byte {end}. Received: {size} bytes. "
            "Copy or download it again."
        )
    tensors, position = {}, 0
    for key, (dtype, shape, offsets) in sorted(fields.items(), key=lambda item: item[1][2]):
        if dtype not in DTYPES:
            raise ValueError(
                f'{file}: "{key}" must be one of {", ".join(DTYPES)}. Received: {dtype}, {shape}.'
            )
        nbytes = DTYPES[dtype].itemsize * math.prod(shape)
        if offsets != (position, position + nbytes) or min(shape, default=0) < 0:
            raise ValueError(
                f'{file}: "{key}" of shape {shape} and dtype {dtype} must lie at the bytes '
                f"{position} to {position + nbytes}, behind the one before. Received: {offsets}."
            )
        tensors[key] = StoredTensor(path, key, DTYPES[dtype], shape, data + position)
        position += nbytes
    return tensors


def _whole(numbers):
    if not isinstance(numbers, list) or not all(type(x) is int for x in numbers):
        raise ValueError(f"sizes must be lists of whole numbers, received {numbers}")
    return tuple(numbers)


def _without_twins(pairs):
    keys = [key for key, _ in pairs]
    twins = (
        sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    )
    if twins:
        raise ValueError(f"it names {twins} twice")
    return dict(pairs)


def write(path, specs, arrays):
    """Writes a safetensors file while the arrays come, one after the other.

    Args:
        path: str.
        specs: dict from key to (dtype, shape), in the order of the file.
        arrays: iterable of NumPy arrays in the same order.
    """
    names, header, position = {dtype: name for name, dtype in DTYPES.items()}, {}, 0
    for key, (dtype, shape) in specs.items():
        end = position + dtype.itemsize * math.prod(shape)
        header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for (key, (dtype, shape)), x in zip(specs.items(), arrays, strict=True):
            if x.shape != tuple(shape):
                raise ValueError(f'"{key}" must have the shape {shape}. Received: {x.shape}.')
            np.ascontiguousarray(x, dtype).tofile(f)
