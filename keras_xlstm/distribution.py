"""Sequences that are split over devices.

An mLSTM is linear in its state, so that a sequence can be cut into segments which devices read at
the same time: each sums up what its segment adds to the memory, a scan over the devices hands each
the memory that it starts from, and then each computes its own outputs. What devices exchange does
not grow with the sequence: a state, once for every doubling of their number.
"""

import keras


class SequenceParallel(keras.distribution.ModelParallel):
    """Splits the steps of every sequence over an axis of the mesh, on JAX.

    The mLSTM runs on all devices at once. An sLSTM cannot: each of its steps needs the one before.
    Its devices take turns instead, each with another piece of the batch.

    All data is split along its second axis, which must be a multiple of the mesh's.

    Args:
        layout_map: `keras.distribution.LayoutMap` with a mesh that has both axes, such as
            `XLSTMBackbone.get_layout_map` makes it, or an empty one: weights are then on all
            devices.
        batch_dim_name: string, the axis of the mesh that splits the batch.
        sequence_dim_name: string, the axis of the mesh that splits the steps.
        **kwargs: as for `keras.distribution.ModelParallel`.

    Raises:
        ValueError: if the mesh has no such axis, or the backend is not JAX.

    Example:

    ```python
    devices = keras.distribution.list_devices()
    mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "sequence"), devices)
    distribution = SequenceParallel(layout_map=keras.distribution.LayoutMap(mesh))
    with distribution.scope():
        layer = keras_xlstm.layers.MLSTM(32, return_sequences=True)
        y = layer(keras.random.normal((2, 64, 16)))
    ```
    """

    def __init__(
        self, *, layout_map, batch_dim_name="batch", sequence_dim_name="sequence", **kwargs
    ):
        super().__init__(layout_map=layout_map, batch_dim_name=batch_dim_name, **kwargs)
        self.sequence_dim_name = sequence_dim_name
        names = self.device_mesh.axis_names
        for name in (batch_dim_name, sequence_dim_name):
            if name not in names:
                raise ValueError(
                    "`batch_dim_name` and `sequence_dim_name` must be axes of the mesh, which has "
                    f"{names}. Received: {name!r}."
                )
        if batch_dim_name == sequence_dim_name:
            raise ValueError(
                "`batch_dim_name` and `sequence_dim_name` must differ: an axis splits one of them. "
                f"Received: {batch_dim_name!r} for both."
            )
        if keras.backend.backend() != "jax":
            raise ValueError(
                "`SequenceParallel` needs JAX, the one backend that Keras distributes on. "
                f"Received: {keras.backend.backend()}. Set KERAS_BACKEND=jax."
            )

    @property
    def sequence_shards(self):
        """Segments that each sequence is cut into."""
        return self._size(self.sequence_dim_name)

    @property
    def batch_shards(self):
        """Parts that each batch is cut into."""
        return self._size(self.batch_dim_name)

    def _size(self, name):
        return self.device_mesh.shape[self.device_mesh.axis_names.index(name)]

    def get_data_layout(self, data_shape):
        axes = [self.batch_dim_name, self.sequence_dim_name, *[None] * len(data_shape)]
        return keras.distribution.TensorLayout(axes[: len(data_shape)], self.device_mesh)
