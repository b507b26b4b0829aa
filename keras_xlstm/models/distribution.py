"""Which axis of which weight is split over the model axis of a mesh of devices.

Of a projection into heads the columns, of one out of them the rows, so that between the two each
device works on its own heads; the same for feed-forward layers; and the vocabulary. A large block
with an mLSTM then adds up twice over the model axis, forward and backward, as a transformer does.

The sLSTM of the large style reads its four gates from one projection, whose columns are ordered by
gate: it is not split, so that no device computes columns for others' heads. Original blocks read
their gates from all heads, and cut their up-projection in two: there, devices exchange features.
"""

import keras

# A pattern for the paths of weights: for each axis, whether it is split.
SPLIT = {
    "token_embedding/embeddings": (True, False),
    "token_embedding/reverse_embeddings": (False, True),
    # Both styles
    "stack/.*/ffn/(gate|up)/kernel": (False, True),
    "stack/.*/ffn/down/kernel": (True, False),
    "stack/.*/(head_norm|mlstm_cell/norm)/scale": (True, False),
    "stack/.*/(input_gate|forget_gate)/kernel": (False, True),
    "stack/.*/(input_gate|forget_gate)/bias": (True,),
    "stack/.*/recurrence/recurrent_kernel": (True, False, False, False),
    "stack/.*/recurrence/bias": (False, True, False),
    # Large
    "stack/.*/mlstm_cell/(query|key|value|output_gate)/kernel": (False, True),
    "stack/.*/mlstm_cell/output/kernel": (True, False),
    # Original
    "stack/block_[0-9]+/up/kernel": (False, True),
    "stack/block_[0-9]+/down/kernel": (True, False),
    "stack/block_[0-9]+/[a-z_]+/dense/kernel": (True, False, False),
    "stack/block_[0-9]+/conv/kernel": (False, True),
    "stack/block_[0-9]+/(conv/bias|skip)": (True,),
}


def layout_map(device_mesh, model_axis, data_axis):
    """Of `XLSTMBackbone.get_layout_map`."""
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: {device_mesh!r}, of type {type(device_mesh).__name__}."
        )
    for name in (model_axis, data_axis):
        if name not in device_mesh.axis_names:
            raise ValueError(
                "`model_parallel_dim_name` and `data_parallel_dim_name` must be axes of "
                f"`device_mesh`, which has {device_mesh.axis_names}. Received: {name!r}."
            )
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, axes in SPLIT.items():
        layouts[pattern] = tuple(model_axis if is_split else None for is_split in axes)
    return layouts
