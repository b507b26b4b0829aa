"""Saving that leaves the old files or the new ones, whole, whenever it is interrupted.

    folder/.saving/...   what is written, and may be cut off: the next save removes it
    folder/.saved/...    the same, renamed once all of it is on the disk: from here on it counts
    folder/...           where each file is moved to, then `.saved` is empty and goes

A process that is killed while it moves leaves the rest in `.saved`: whoever opens the folder, or
saves to it, first moves that too. Nothing else in the folder is touched.
"""

import contextlib
import math
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import ml_dtypes  # noqa: F401  NumPy then knows bfloat16
import numpy as np

SAVING, SAVED, GONE = ".saving", ".saved", ".gone"
HDF5_EXTRA = 2**13  # bytes that it takes beside a variable's numbers, at most
# Forms of the same weights. A reader prefers some to others, so none of an older save may stay.
WEIGHTS = (
    "model.weights.h5",
    "model.weights.json",
    "model_*.weights.h5",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "model_*.safetensors",
)


@contextlib.contextmanager
def saving(folder, variables=()):
    """Yields a folder to write into. Its files then take their places in `folder`, all or none.

    Args:
        folder: path.
        variables: those that HDF5 will write, which may crash the process where a disk is full:
            there must be room for them before it begins.

    Raises:
        ValueError: if `folder` is no path.
        OSError: if anything cannot be written. Then `folder` is as it was.
    """
    target = _path(folder)
    new, is_made = target / SAVING, not target.exists()
    with _named(folder):
        try:
            target.mkdir(parents=True, exist_ok=True)
            finish(target)
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _check_room(new / "room", variables)
            yield str(new)
            _bury(target, new)
            for path in _files(new):
                _to_disk(path)
            new.rename(target / SAVED)
            finish(target)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            if is_made:
                with contextlib.suppress(OSError):
                    target.rmdir()
            raise


@contextlib.contextmanager
def saving_file(path, variables=()):
    """Yields the path of a file to write, which then takes the place of `path`.

    Args:
        path: path.
        variables: as for `saving`.

    Raises:
        OSError: if it cannot be written. Then what stood there is as it was.
    """
    path = _path(path)
    new = path.with_name(f"{SAVING}-{path.name}")
    with _named(path):
        try:
            _check_room(new, variables)
            yield str(new)
            _to_disk(new)
            new.replace(path)
        finally:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)


def finish(folder):
    """Moves what an interrupted save has left to move."""
    saved = Path(folder) / SAVED
    if not saved.is_dir():
        return
    for path in _files(saved):
        place = Path(folder) / path.relative_to(saved)
        if path.suffix == GONE:
            place.with_suffix("").unlink(missing_ok=True)
            path.unlink()
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    shutil.rmtree(saved)


def _path(path):
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"`path` must be a string or a path, to save to. Received: {path!r}.")
    return Path(path)


def _check_room(path, variables):
    if variables and hasattr(os, "posix_fallocate"):
        size = sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize + HDF5_EXTRA for v in variables)
        with open(path, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, size)
        path.unlink()


def _bury(target, new):
    """Where `new` has weights, marks those of `target` that they do not replace but outdate."""

    def weights(folder):
        return {x.name for x in folder.iterdir() if any(fnmatch(x.name, p) for p in WEIGHTS)}

    if written := weights(new):
        for name in weights(target) - written:
            (new / f"{name}{GONE}").touch()


def _files(folder):
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def _to_disk(path):
    with open(path, "rb") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def _named(path):
    try:
        yield
    except (OSError, RuntimeError) as e:  # HDF5 raises either where a disk is full
        reason = e.__cause__ or e  # of a save within this one
        raise OSError(
            getattr(e, "errno", None),
            f"Nothing was saved to '{path}', and what stood there is unchanged, as a file could "
            f"not be written ({reason}). Free some space, or save to another folder",
        ) from reason
