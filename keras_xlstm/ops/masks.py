from keras import ops

from keras_xlstm.ops.checks import as_tensor, check_shapes


def steps_that_happen(mask):
    """Where the steps that happen stand, and each step's place among them.

    Args:
        mask: bool tensor, (B, S).

    Returns:
        order, (B, S), int32: the indices of the steps that happen, in order, then the others'.
        rank, (B, S), int32: for each step, how many happened up to it, less one; 0 before any.
    """
    steps, S = ops.arange(ops.shape(mask)[1], dtype="int32"), ops.shape(mask)[1]
    order = ops.argsort(ops.where(mask, steps, steps + S), axis=1)
    rank = ops.maximum(ops.cumsum(ops.cast(mask, "int32"), axis=1) - 1, 0)
    return ops.cast(order, "int32"), rank


def take_steps(x, indices):
    """x (B, S, D) at indices (B, T) -> (B, T, D)."""
    return ops.take_along_axis(x, indices[..., None], axis=1)


def segment_starts(segment_ids):
    """Where a document starts, for the `reset` of operations, layers and stacks.

    Args:
        segment_ids: int tensor, (B, S), the same number for all steps of a document and another
            for the next one's. Padding between documents may have any number; padding within a
            document has the document's.

    Returns:
        Bool tensor, (B, S): whether the number differs from that of the step before. `False` at
        the first step, so that a row goes on from the state that it is given.

    Example:

    ```python
    keras_xlstm.ops.segment_starts([[1, 1, 2, 2, 2, 3]])  # [[0, 0, 1, 0, 0, 1]]
    ```
    """
    ids = as_tensor("segment_ids", segment_ids, "int")
    check_shapes(segment_ids=(ids, "B S"))
    changes = ops.not_equal(ids[:, 1:], ids[:, :-1])
    return ops.concatenate([ops.zeros_like(ids[:, :1], "bool"), changes], axis=1)
