"""Kernels under sharding and `vmap`: by batch and by head, a device computes what it holds.

XLA cannot look into a kernel. Without a rule it would gather a kernel's inputs on every device.
"""

import jax
import jax.numpy as jnp
import keras
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

FREE = "B", "NH"  # the axes along which a kernel may be cut


def by_batch_and_head(function, inputs, outputs, on_tpu=False):
    """A function that is cut along the axes "B" and "NH", and no other, and that can be mapped.

    As its arrays are sharded, which XLA knows when it compiles. For a TPU it does not ask (JAX
    issue 38196): there, along the mesh of `keras.distribution`, see `over_mesh`.

    Args:
        function: callable, from arrays to a tuple of arrays. Rows of the batch, and heads, must
            not depend on each other, and no output may be a sum over them. It is traced for the
            sizes that a device holds, and must close over no array.
        inputs, outputs: for each array the names of its axes, such as `"B S NH DHQK"`. Each
            output has an axis "B".
        on_tpu: bool, whether it is compiled for a TPU, or computes as if.

    Returns:
        A callable like `function`. It is not differentiable: that is for a `custom_vjp` around
        it.
    """
    inputs, outputs = (tuple(names.split() for names in arrays) for arrays in (inputs, outputs))
    if on_tpu:
        return mapped(over_mesh(function, inputs, outputs), inputs, outputs)
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


def over_mesh(function, inputs, outputs):
    """`function` along the mesh of `keras.distribution`, where one is set and divides the sizes.

    "B" along its axis for batches, "NH" along the others, which share out a model. Inside a
    `shard_map` over some axes of that mesh, as of split sequences, those are taken already.
    """

    def call(*arrays):
        distribution = keras.distribution.distribution()
        if distribution is None or distribution.device_mesh is None:
            return tuple(function(*arrays))
        mesh = distribution.device_mesh
        sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        around = jax.sharding.get_abstract_mesh()  # of a `shard_map` that this is called in
        by_hand = set(around.manual_axes)
        if by_hand and not by_hand < set(sizes):
            return tuple(function(*arrays))
        lengths = {}
        for axes, x in zip(inputs, arrays, strict=True):
            lengths.update(zip(axes, x.shape, strict=True))
        chosen = {}
        for name, size in sizes.items():
            if name in by_hand:
                continue
            axis = "B" if name == distribution.batch_dim_name else "NH"
            if axis not in chosen and lengths[axis] % size == 0:
                chosen[axis] = name
        specs = [PartitionSpec(*(chosen.get(name) for name in axes)) for axes in inputs + outputs]
        return jax.shard_map(
            lambda *arrays: tuple(function(*arrays)),
            mesh=around if by_hand else AbstractMesh(tuple(sizes.values()), tuple(sizes)),
            axis_names=set(sizes) - by_hand,
            in_specs=tuple(specs[: len(inputs)]),
            out_specs=tuple(specs[len(inputs) :]),
            check_vma=False,
        )(*arrays)

    return call


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
