from keras import ops


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
