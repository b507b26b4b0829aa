"""Models of NX-AI's `xlstm` package: `xLSTMLarge`, `xLSTMLMModel` and `xLSTMBlockStack`."""

import dataclasses
import os
from collections.abc import Mapping

import keras
import numpy as np

from keras_xlstm.converters import large, original, safetensors
from keras_xlstm.converters.transformers import GIGABYTE
from keras_xlstm.converters.weights import as_array, check_room, equal, load, shards
from keras_xlstm.files import finish, saving
from keras_xlstm.layers import XLSTMBlockStack
from keras_xlstm.ops.checks import check_positive, check_positive_int

CONFIG_FILE, SINGLE, SHARD = "config.yaml", "model.safetensors", "model_{}.safetensors"
LARGE_EMBEDDING = "embedding.weight"


class ArrayTensor:
    """A tensor in memory, beside `StoredTensor`."""

    file = "the state dict"

    def __init__(self, key, x):
        self.x = as_array(x)
        self.dtype, self.shape, self.nbytes = self.x.dtype, self.x.shape, self.x.nbytes
        if self.dtype not in safetensors.DTYPES.values():
            raise ValueError(
                f'{self.file}: "{key}" must be one of {", ".join(safetensors.DTYPES)}. '
                f"Received: {self.dtype}, {self.shape}."
            )

    def read(self, dtype=None):
        return self.x.astype(dtype or self.dtype, copy=False)

    def view(self):
        return self.x


def from_xlstm(source, config=None, dtype=None):
    """Opens a model of NX-AI's `xlstm` package.

    Args:
        source: a folder with `config.yaml` and `model.safetensors` (or `model_0.safetensors`, and
            so on), a safetensors file, a state dict, or a model of the package. A file of
            `torch.save` is not opened, as it can run code: pass
            `torch.load(path, weights_only=True)`.
        config: the model's configuration: a dict, or one of the package's dataclasses. `None` if
            the source has it: a folder or a model.
        dtype: string or `keras.DTypePolicy`, of the model.

    Returns:
        An `XLSTMCausalLM` for `xLSTMLarge` and `xLSTMLMModel`, without a preprocessor, or an
        `XLSTMBlockStack` for `xLSTMBlockStack`.

    Raises:
        ValueError: if anything does not fit. Then nothing is returned.

    Example:

    ```python
    model = keras_xlstm.converters.from_xlstm("folder")
    keras_xlstm.converters.to_xlstm(model, "another_folder")
    ```
    """
    tensors, config, name = _open(source, config)
    if LARGE_EMBEDDING in tensors:
        return _load_large(tensors, config, name, dtype)
    return _load_original(tensors, config, name, dtype)


def to_xlstm(model, folder, slstm_layout="vanilla", max_shard_size=5, context_length=2048):
    """Writes a model for NX-AI's `xlstm` package: `config.yaml` and safetensors files.

    `xlstm.xlstm_large.from_pretrained.load_from_pretrained(folder)` opens models of large blocks;
    for the others, the configuration and the state dict fit the package's classes.

    Args:
        model: an `XLSTMCausalLM` or `XLSTMBackbone`, or an `XLSTMBlockStack` of original blocks
            that is built.
        folder: str.
        slstm_layout: `"vanilla"` or `"cuda"`, the implementation of the sLSTM that is to read it.
        max_shard_size: float, gigabytes a file.
        context_length: int, the longest sequence that `xLSTMLMModel` and `xLSTMBlockStack` are to
            take: each of their mLSTM keeps a mask of this length squared. Ours have no such limit.
    """
    import yaml

    check_positive(max_shard_size=max_shard_size)
    check_positive_int(context_length=context_length)
    if slstm_layout not in tuple(original.SLSTM_LAYOUTS):
        raise ValueError(
            f"`slstm_layout` must be one of {tuple(original.SLSTM_LAYOUTS)}. "
            f"Received: {slstm_layout!r}."
        )
    if isinstance(model, XLSTMBlockStack):
        if model.block_style != "original":
            raise ValueError(
                "A stack alone must have blocks of the 2024 paper. Received: "
                f"block_style={model.block_style!r}. Pass the language model around it."
            )
        if not model.built:
            raise ValueError(
                "`model` must have its weights: call it on an input, then convert it. Received: "
                "a stack that is not built."
            )
        width = model.norm.gamma.shape[0]
        config = original.their_config(model, width, slstm_layout)
        weights = original.table(model, slstm_layout)
    else:
        backbone = getattr(model, "backbone", model)
        if not hasattr(backbone, "token_embedding"):
            raise ValueError(
                "`model` must be an `XLSTMCausalLM`, `XLSTMBackbone` or `XLSTMBlockStack`. "
                f"Received: {type(model).__name__}."
            )
        cap = getattr(model, "logit_soft_cap", large.LOGIT_SOFT_CAP[1])
        if backbone.block_style == "large":
            config = large.their_config(backbone, cap, large.XLSTM_LARGE)
            weights = large.table(backbone, LARGE_EMBEDDING)
        else:
            config, weights = _original_model(backbone, cap, slstm_layout)
    if "slstm_at" in config:
        config["context_length"] = context_length
    dtype = np.dtype(model.dtype_policy.variable_dtype)
    lists = shards(weights, dtype, max_shard_size * GIGABYTE)
    with saving(folder) as new:
        with open(os.path.join(new, CONFIG_FILE), "w", encoding="utf-8") as f:
            yaml.safe_dump(config, f, sort_keys=False)
        for n, part in enumerate(lists):
            file = SINGLE if len(lists) == 1 else SHARD.format(n)
            specs = {weight.key: (dtype, weight.shape) for weight in part}
            arrays = (weight.value(dtype) for weight in part)
            safetensors.write(os.path.join(new, file), specs, arrays)


def _original_model(backbone, cap, slstm_layout):
    if cap is not None:
        raise ValueError(
            f"`logit_soft_cap` must be `None`: `xLSTMLMModel` has none. Received: {cap}."
        )
    tied = backbone.tie_embeddings
    config = original.their_config(backbone.stack, backbone.hidden_dim, slstm_layout)
    config |= {"vocab_size": backbone.vocabulary_size, "tie_weights": tied}
    weights = original.table(
        backbone.stack, slstm_layout, original.STACK, backbone.token_embedding, tied
    )
    return config, weights


def state_from_xlstm(stack, state):
    """The state that `xLSTMBlockStack.step` returned, for our stack to go on from.

    Args:
        stack: the `XLSTMBlockStack` that `from_xlstm` made of theirs.
        state: theirs.

    Returns:
        What `stack(x, initial_state=...)` takes; of a language model, what `call_with_cache` takes.

    Raises:
        ValueError: if it is not the state of such a stack.
    """
    _check_stack(stack)
    ours = original.state_to_ours(stack, state)
    return [[keras.ops.convert_to_tensor(x, "float32") for x in tensors] for tensors in ours]


def state_to_xlstm(stack, state):
    """The reverse of `state_from_xlstm`, in NumPy arrays."""
    _check_stack(stack)
    stack.check(None, state, "state")
    return original.state_to_theirs(stack, state)


def _check_stack(stack):
    if not isinstance(stack, XLSTMBlockStack) or stack.block_style != "original":
        raise ValueError(
            "`stack` must be an `XLSTMBlockStack` of original blocks: of a language model pass "
            f"`lm.backbone.stack`. Received: {type(stack).__name__}."
        )


def _open(source, config):
    """(tensors, configuration as a dict, name of where it stands) of any source."""
    if hasattr(source, "state_dict") and hasattr(source, "config"):
        config, source = config or source.config, source.state_dict()
    if isinstance(source, Mapping):
        tensors = {key: ArrayTensor(key, x) for key, x in source.items()}
        return tensors, _as_dict(config), "the configuration"
    if not isinstance(source, (str, os.PathLike)) or not os.path.exists(source):
        raise ValueError(
            "`source` must be a folder, a safetensors file, a state dict or a model of `xlstm`. "
            f"Received: {source!r}."
        )
    if os.path.isfile(source):
        return safetensors.read_header(source), _as_dict(config), "the configuration"
    if config is not None:
        return _open_folder(source), _as_dict(config), "the configuration"
    return _open_folder(source), _read_config(os.path.join(source, CONFIG_FILE)), CONFIG_FILE


def _open_folder(folder):
    finish(folder)
    single = os.path.join(folder, SINGLE)
    if os.path.exists(single):
        return safetensors.read_header(single)
    tensors, n = {}, 0
    while os.path.exists(path := os.path.join(folder, SHARD.format(n))):
        found = safetensors.read_header(path)
        twice = sorted(set(found) & set(tensors))
        if twice:
            first = tensors[twice[0]].file
            raise ValueError(f'"{twice[0]}" is in {first} and again in {SHARD.format(n)}.')
        tensors, n = tensors | found, n + 1
    if not tensors:
        raise ValueError(
            f"'{folder}' has neither {SINGLE} nor {SHARD.format(0)}. Other files are not opened. "
            f"{safetensors.PICKLE_ADVICE}"
        )
    return tensors


def _read_config(path):
    import yaml

    if not os.path.exists(path):
        raise ValueError(f"'{path}' is missing. Pass the configuration as `config`.")
    with open(path, encoding="utf-8") as f:
        try:
            return _as_dict(yaml.safe_load(f))
        except yaml.YAMLError as e:
            raise ValueError(f"{CONFIG_FILE} must hold plain YAML, without objects ({e}).") from e


def _as_dict(config):
    if dataclasses.is_dataclass(config):
        return dataclasses.asdict(config)
    if not isinstance(config, Mapping):
        raise ValueError(
            "`config` must be a dict or a dataclass of the `xlstm` package. "
            f"Received: {type(config).__name__}."
        )
    return dict(config)


def _load_large(tensors, config, name, dtype):
    from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

    ours = large.backbone_config(config, large.XLSTM_LARGE, name)
    shape = ours["vocabulary_size"], ours["hidden_dim"]
    check_room(tensors, LARGE_EMBEDDING, shape, ours["num_layers"], name)
    backbone = XLSTMBackbone(**ours, dtype=dtype)
    # The package ignores the mode that a folder's configuration names; the keys tell it.
    fused = any(key.endswith("qkv_opreact.weight") for key in tensors)
    load(large.table(backbone, LARGE_EMBEDDING, fused=fused), tensors, name)
    return XLSTMCausalLM(backbone, logit_soft_cap=large.logit_soft_cap(config, name))


def _load_original(tensors, config, name, dtype):
    ours, layout = original.stack_config(config, name), original.slstm_layout(tensors)
    vocabulary_size = large.number(config, "vocab_size", 1, name)
    shape = vocabulary_size, ours["hidden_dim"]
    check_room(tensors, original.EMBEDDING, shape, ours["num_layers"], name)
    if "vocab_size" not in config:
        num_blocks, width = ours.pop("num_layers"), ours.pop("hidden_dim")
        stack = XLSTMBlockStack(num_blocks, dtype=dtype, **ours)
        stack.build((None, None, width))
        load(original.table(stack, layout), tensors, name)
        return stack
    from keras_xlstm.models import XLSTMBackbone, XLSTMCausalLM

    tied = bool(config.get("tie_weights", False))
    pair = tensors.get(original.EMBEDDING), tensors.get(original.HEAD)
    if tied and all(pair) and not equal(*pair):
        raise ValueError(
            f'{pair[1].file}: "{original.HEAD}" must equal "{original.EMBEDDING}", as {name} has '
            f"tie_weights=True. Received: different matrices, {pair[1].shape} and {pair[0].shape}."
        )
    backbone = XLSTMBackbone(
        vocabulary_size,
        tie_embeddings=tied,
        dtype=dtype,
        **ours,
    )
    weights = original.table(backbone.stack, layout, original.STACK, backbone.token_embedding, tied)
    load(weights, tensors, name)
    return XLSTMCausalLM(backbone, logit_soft_cap=None)
