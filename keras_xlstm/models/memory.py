"""How much memory training and decoding take, told from shapes: nothing is allocated.

Weights, gradients, the optimizer's slots and decoding states are exact. Activations are named
tensors of a train step that XLA compiles and lays out for little memory, or that PyTorch computes
eagerly: those that stay for the backward pass, and what the loss, the update of the weights, or the
block that is computed again works with.
"""

import dataclasses
import math
import re
from concurrent.futures import ThreadPoolExecutor
from types import MethodType, SimpleNamespace

import keras
import numpy as np
from keras.src.optimizers.base_optimizer import BaseOptimizer

from keras_xlstm.layers.large_block import XLSTMLargeBlock
from keras_xlstm.layers.mlstm_block import MLSTMBlock
from keras_xlstm.models.backbone import XLSTMBackbone
from keras_xlstm.models.distribution import SPLIT
from keras_xlstm.ops.checks import check_positive_int, is_int, repr
from keras_xlstm.ops.mlstm_chunks import Chunks

AXES = ("batch", "model")
UPDATE = 3  # lists as large as the weights: PyTorch's AdamW computes with them all at once


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as `predict_memory` tells them.

    Attributes:
        parameters: of the weights, in the dtype in which they are kept.
        gradients: of the weights' gradients.
        optimizer: of its slots and counters.
        activations: at the largest moment of forward and backward pass, but for gradients.
        states: of all blocks in decoding, which training does not keep.
        total: of a train step. A compiled step updates each weight as soon as its gradient is
            there, so that it holds the gradients of one block at a time; all of them at once
            under PyTorch, or where `global_clipnorm` of the optimizer wants it. PyTorch's update
            takes three more lists as large as the weights, as AdamW's does.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    states: int
    total: int


def predict_memory(config, batch_size, sequence_length, optimizer="adamw", remat=False, mesh=None):
    """The bytes that training a model takes on each device, and its states in decoding.

    Nothing is allocated: the 7B is as quick as any. Of a train step of `XLSTMCausalLM` with its
    own loss. Parameters, gradients, optimizer and states are exact. Activations are those of a
    step that XLA compiles for little memory or, where the backend is PyTorch, of an eager one:
    `examples/README.md` has how far they are off. On a CPU, XLA keeps float32 copies of 16 bits,
    which are not counted.

    Args:
        config: an `XLSTMBackbone`, or a dict of its arguments.
        batch_size: int, rows of all devices.
        sequence_length: int, steps a row.
        optimizer: string or `keras.optimizers.Optimizer`.
        remat: bool, whether the model is made under `keras.RematScope("full")`.
        mesh: dict from `"batch"` and `"model"` to the devices along that axis, as
            `XLSTMBackbone.get_layout_map` shares things out. `None` for one device.

    Returns:
        A `Memory`, in bytes: parameters, gradients, optimizer, activations, states, total.

    Raises:
        ValueError: if an argument is wrong, or the mesh does not divide what it splits.

    Example:

    ```python
    large = dict(vocabulary_size=50304, num_layers=32, hidden_dim=4096, num_heads=8)
    memory = keras_xlstm.models.predict_memory(large, 8, 2048, remat=True, mesh={"model": 8})
    memory.total / 1e9  # GB
    ```
    """
    config = _arguments(config)
    check_positive_int(batch_size=batch_size, sequence_length=sequence_length)
    if not isinstance(remat, bool):
        raise ValueError(f"`remat` must be a bool. Received: remat={repr(remat)}.")
    batch, model = _axes(mesh).values()
    rows = _share(batch_size, batch, "batch_size")
    optimizer = keras.optimizers.get(optimizer)
    optimizer = type(optimizer).from_config(optimizer.get_config())  # not the caller's own
    # Keras would give numbers to all these variables at the end of the thread's next scope.
    with ThreadPoolExecutor(1) as thread:
        policy = keras.config.dtype_policy()
        backbone, weights = thread.submit(_build, config, policy, optimizer, model).result()
    parameters = sum(map(_bytes, weights.values()))
    states = [s for block in backbone.stack.blocks for s in block.state_shapes.values()]
    eager = keras.backend.backend() == "torch"
    before, after = _activations(backbone, rows, sequence_length, model, remat, eager)
    slots = sum(map(_bytes, optimizer.variables))
    at_once = parameters if eager or optimizer.global_clipnorm else 0
    update = (1 + UPDATE) * parameters if eager else 0  # with the gradients
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=slots,
        activations=before,
        states=4 * rows * sum(_share(math.prod(s), model, "a state") for s in states),
        total=parameters + slots + max(before + _gradients(weights), after + at_once, update),
    )


def _build(config, policy, optimizer, model):
    """A backbone without numbers, and of each weight a device's part, for which `optimizer` is."""
    keras.config.set_dtype_policy(policy)
    # TensorFlow's own would place slots beside weights that are not there.
    for name in ("add_variable_from_reference", "_var_key"):
        setattr(optimizer, name, MethodType(getattr(BaseOptimizer, name), optimizer))
    with keras.StatelessScope(initialize_variables=False):
        backbone = XLSTMBackbone(**config)
        weights = {w.path: _local(w, model) for w in backbone.trainable_variables}
        try:
            optimizer.build(list(weights.values()))
        except ValueError as e:
            raise ValueError(
                "`optimizer` must be one that Keras builds without memory, such as 'adamw'. "
                f"Received: {type(optimizer).__name__}."
            ) from e
    return backbone, weights


def _arguments(config):
    """Of an `XLSTMBackbone`, as a dict."""
    if isinstance(config, XLSTMBackbone):
        config = config.get_config()
    if not isinstance(config, dict):
        raise ValueError(
            "`config` must be an `XLSTMBackbone`, or a dict of its arguments. "
            f"Received: config={repr(config)}."
        )
    return config


def _axes(mesh):
    given = {} if mesh is None else mesh
    known = isinstance(given, dict) and set(given) <= set(AXES)
    if not known or not all(is_int(n) and n >= 1 for n in given.values()):
        raise ValueError(
            f"`mesh` must be a dict from axes among {AXES} to their devices, or None for one. "
            f"Received: mesh={repr(mesh)}."
        )
    return dict.fromkeys(AXES, 1) | given


def _share(size, devices, what):
    if size % devices:
        raise ValueError(
            f"`mesh` must divide what it splits. Received: {devices} devices for {what} of {size}."
        )
    return size // devices


def _local(weight, devices):
    """A device's part of a weight."""
    split = next((axes for path, axes in SPLIT.items() if re.fullmatch(path, weight.path)), ())
    shape = list(weight.shape)
    for axis, is_split in enumerate(split):
        if is_split:
            shape[axis] = _share(shape[axis], devices, f"axis {axis} of `{weight.path}`")
    return keras.Variable("zeros", shape=shape, dtype=weight.dtype, name=weight.name)


def _bytes(variable):
    return math.prod(variable.shape) * np.dtype(variable.dtype).itemsize


def _gradients(weights):
    """Of the block, or other layer, with the most weights."""
    layers = {}
    for path, weight in weights.items():
        layer = re.sub(r"(block_[0-9]+)/.*", r"\1", path)
        layers[layer] = layers.get(layer, 0) + _bytes(weight)
    return max(layers.values())


def _activations(backbone, rows, steps, model, remat, eager):
    """Bytes before the first gradient of a weight, and those beside all of them."""
    tokens, D = rows * steps, backbone.hidden_dim
    compute = np.dtype(backbone.stack.compute_dtype).itemsize
    vocabulary = _share(backbone.vocabulary_size, model, "vocabulary_size")
    layout = rows, steps, D, model, compute, remat, eager
    blocks = [_block(x, *layout) for x in backbone.stack.blocks]
    embedded = 2 * D * compute  # as looked up, and where ids are out of range
    norm = 2 * D * compute  # of the stack: normalized and scaled, or centred
    # Loops of all blocks of a kind write into the same zeros.
    written = sum(set(_written(x, rows, steps, D, model) for x in backbone.stack.blocks))
    if remat:
        # The inputs of all blocks, and one that is computed again, but for its silu. The gradients
        # of its input come one for each projection; PyTorch adds them up as they come. Of the
        # logits: tanh of the cap and their softmax, and PyTorch's gradient of the cap.
        again = max(blocks) + tokens * (3 if eager else 7) * D * compute + written
        inputs = tokens * D * compute * len(blocks)
        head = tokens * (norm // 2 + (3 if eager else 2) * 4 * vocabulary)
        return tokens * embedded + inputs + head + again, tokens * embedded + again
    head = tokens * (norm + (3 if eager else 2) * 4 * vocabulary)
    kept = tokens * embedded + written
    return kept + sum(blocks) + head, kept + blocks[0]


def _block(block, rows, steps, D, model, compute, remat, eager):
    """Bytes that a block keeps for its backward pass."""
    tokens, NH = rows * steps, block.num_heads // model
    if isinstance(block, XLSTMLargeBlock):
        F = block.ffn.intermediate_dim // model
        # Sums of both branches, what is normalized for each, of which XLA keeps one before it is
        # scaled; gate, up, sigmoid, product, silu.
        kept = compute * ((3 if eager else 4) * D + (4 if remat else 5) * F)
        if eager and compute < 4 and not remat:  # float32 around both norms
            kept += 4 * 5 * D
        if block.slstm:
            return tokens * (kept + _slstm(D // model, compute))
        cell = block.mixer.cell
        DHQK, DHHV = cell.key_dim, cell.value_dim
        # Queries, keys; the heads' normalized outputs, the gate, what it lets through.
        kept += compute * NH * (2 * DHQK + 3 * DHHV)
        return tokens * kept + _mlstm(rows, steps, NH, DHQK, DHHV, block.chunk_size, compute)
    if isinstance(block, MLSTMBlock):
        inner = block.head_dim * NH
        # Of the block's width: its sum, what is normalized, and centred. Of the inner width:
        # up-projection (2), convolution (2), silu (2), query, key, all three side by side (3), the
        # heads' normalized outputs, those with the skip, the gate's silu (2), what it lets through.
        # XLA keeps two more around the convolution, PyTorch four: steps in order, without the
        # masked ones.
        kept = compute * (3 * D + (20 if eager else 18) * inner)
        heads = NH, block.head_dim, block.head_dim
        return tokens * kept + _mlstm(rows, steps, *heads, block.chunk_size, compute)
    F = block.ffn.intermediate_dim // model
    # Sums (2), what is normalized (2), and centred (2); convolution (2) and silu (2); of the
    # feed-forward layer gate, up, erfc (2), gelu, product.
    kept = compute * (6 * D + 4 * D + 6 * F)
    return tokens * (kept + _slstm(D // model, compute))


def _slstm(D, compute):
    """A token: the gates, in float32 those with what the recurrence adds, four states; outputs."""
    return 4 * D * compute + 4 * (4 * D + 4 * D) + compute * D


def _written(block, rows, steps, D, model):
    """Zeros that a loop over the sequence writes into, float32."""
    is_slstm = block.state_shapes.keys() >= {"h", "c"}
    if is_slstm:
        return 4 * rows * steps * 4 * D // model  # raw gates
    cell = getattr(block, "mixer", None)
    width = cell.cell.value_dim if cell else block.head_dim
    return 4 * rows * steps * width * block.num_heads // model  # outputs


def _mlstm(rows, steps, NH, DHQK, DHHV, chunk_size, compute):
    """Of the memory: values, outputs, gates, and states at the starts of groups of chunks."""
    tokens = rows * steps
    q, v = (SimpleNamespace(shape=(rows, steps, NH, width)) for width in (DHQK, DHHV))
    chunks = Chunks.of(q, v, chunk_size)
    groups = chunks.groups(steps)
    # i, f, their caps, log_f, s, m, m before, n^T q
    kept = tokens * NH * (compute * DHHV + 4 * DHHV + 9 * 4)
    if groups > 1:
        return kept + 4 * groups * rows * NH * DHQK * (DHHV + 1)
    # A loop of one turn is none: the compiler keeps what it computed, instead of doing so again.
    # What is read (q, k), keys as weighted, both parts of the outputs, decays and their products.
    kept += 4 * tokens * NH * (3 * DHQK + DHHV + 2 * chunks.L)
    return kept + 4 * (chunks.G + 1) * rows * NH * DHQK * (DHHV + 1)
