"""Kernels under sharding and `vmap`: by batch and by head, a device computes what it holds.

XLA cannot look into a kernel. Without a rule it would gather a kernel's inputs on every device.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

FREE = "B", "NH"  # the axes along which a kernel may be cut


def by_batch_and_head(function, inputs, outputs, sharded=True):
    """A function that XLA cuts along the axes "B" and "NH", and no other, and that can be mapped.

    Args:
        function: callable, from arrays to a tuple of arrays. Rows of the batch, and heads, must
            not depend on each other, and no output may be a sum over them. It is traced for the
            sizes that a device holds, and must close over no array.
        inputs, outputs: for each array the names of its axes, such as `"B S NH DHQK"`. Each
            output has an axis "B".
        sharded: bool. JAX cannot cut what has side effects, as Pallas' interpreter of TPUs.

    Returns:
        A callable like `function`. It is not differentiable: that is for a `custom_vjp` around
        it.
    """
    inputs, outputs = (tuple(names.split() for names in arrays) for arrays in (inputs, outputs))
    if not sharded:
        return mapped(function, inputs, outputs)
    cut = custom_partitioning(lambda *arrays: tuple(function(*arrays)))

    def partition(mesh, arguments, results):
        shardings = of_all(mesh, inputs + outputs, [*arguments, *results])
        return mesh, cut.fun, shardings[len(inputs) :], shardings[: len(inputs)]

    def infer(mesh, arguments, results):
        return of_all(mesh, inputs + outputs, arguments)[len(inputs) :]

    names = dict.fromkeys(name for axes in inputs + outputs for name in axes)  # in this order
    cut.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=" -> ".join(", ".join(map(" ".join, x)) for x in (inputs, outputs)),
        need_replication_factors=tuple(name for name in names if name not in FREE),
    )
    return mapped(cut, inputs, outputs)


def of_all(mesh, arrays, shapes):
    """The shardings of all arrays: of "B" and "NH" as the first array that has one there.

    `shapes` may be fewer than `arrays`: those whose shardings are known.
    """
    chosen = {}
    used = set()
    for axes, shape in zip(arrays, shapes, strict=False):
        for name, over in zip(axes, shape.sharding.spec, strict=False):
            over = (over,) if isinstance(over, str) else tuple(over or ())
            if name in FREE and name not in chosen and over and used.isdisjoint(over):
                chosen[name] = over
                used.update(over)
    return tuple(
        NamedSharding(mesh, PartitionSpec(*(chosen.get(name) for name in axes))) for axes in arrays
    )


def mapped(function, inputs, outputs):
    """`function`, which under `jax.vmap` takes what is mapped as more rows of the batch."""
    function = custom_vmap(function)

    @function.def_vmap
    def rule(size, is_mapped, *arrays):
        if any(x and "B" not in axes for x, axes in zip(is_mapped, inputs, strict=True)):
            # Weights of their own: one call after the other.
            moving = [x for x, moves in zip(arrays, is_mapped, strict=True) if moves]

            def one(moving):
                moving = iter(moving)
                pairs = zip(arrays, is_mapped, strict=True)
                return function(*(next(moving) if moves else x for x, moves in pairs))

            return jax.lax.map(one, moving), (True,) * len(outputs)

        def fold(x, axes, moves):
            if "B" not in axes:
                return x
            if not moves:
                x = jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.moveaxis(x, 0, axes.index("B"))
            return jax.lax.collapse(x, axes.index("B"), axes.index("B") + 2)

        def unfold(x, axes):
            at = axes.index("B")
            x = x.reshape(*x.shape[:at], size, x.shape[at] // size, *x.shape[at + 1 :])
            return jnp.moveaxis(x, at, 0)

        folded = function(*map(fold, arrays, inputs, is_mapped))
        return tuple(map(unfold, folded, outputs)), (True,) * len(outputs)

    return function
