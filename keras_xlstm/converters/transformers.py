"""Checkpoints of `transformers`, `model_type: xlstm`: `XLSTMCausalLM.from_preset(folder)` opens
them and `export_to_transformers(folder)` writes them.
"""

import json
import os

import numpy as np

from keras_xlstm.converters import large, safetensors
from keras_xlstm.converters.weights import check_room, equal, load, shards
from keras_xlstm.files import saving
from keras_xlstm.ops.checks import check_positive

CONFIG_FILE = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ENDING = ".safetensors"
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
BARE_EMBEDDING = "embeddings.weight"  # of an `xLSTMModel`, which has neither prefix nor head
WEIGHT_MODES = ("single", "fused")
GIGABYTE = 2**30


def backbone_config(config, tensors=None):
    """The arguments of `XLSTMBackbone`.

    Args:
        config: dict, the content of `config.json`.
        tensors: dict of the checkpoint's tensors, if there are any: they tell whether the head is
            a matrix of its own. `transformers` keeps two matrices whatever the configuration says,
            so with `tie_word_embeddings` they are tied here only if they are equal.
    """
    tied = bool(config.get("tie_word_embeddings", False))
    if tied and tensors and HEAD in tensors and EMBEDDING in tensors:
        tied = equal(tensors[HEAD], tensors[EMBEDDING])
    ours = large.backbone_config(config, large.TRANSFORMERS, CONFIG_FILE)
    if tensors is not None:
        embedding = EMBEDDING if EMBEDDING in tensors else BARE_EMBEDDING
        shape = ours["vocabulary_size"], ours["hidden_dim"]
        check_room(tensors, embedding, shape, ours["num_layers"], CONFIG_FILE)
    return ours | {"tie_embeddings": tied}


def open_tensors(get_file):
    """All tensors of a checkpoint, in one file or many: only headers are read.

    Args:
        get_file: function from a file's name to its local path, or to a `FileNotFoundError`.
    """
    try:
        return safetensors.read_header(get_file(SINGLE))
    except FileNotFoundError:
        pass
    try:
        index = get_file(INDEX)
    except FileNotFoundError as e:
        raise ValueError(
            f"There is neither {SINGLE} nor {INDEX}. Weights in other files, as "
            f"pytorch_model.bin, are not opened. {safetensors.PICKLE_ADVICE}"
        ) from e
    try:
        with open(index, encoding="utf-8") as f:
            files = dict(json.load(f)["weight_map"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{INDEX} must hold a `weight_map` from key to file ({e!r}).") from e
    tensors, paths = {}, {}
    for file in dict.fromkeys(files.values()):
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(ENDING):
            raise ValueError(
                f"{INDEX} must name {ENDING} files of its own folder. Received: {file!r}."
            )
        try:
            paths[file] = get_file(file)
        except FileNotFoundError as e:
            raise ValueError(f"{INDEX} names {file}, which is missing.") from e
    for file, path in paths.items():
        found = safetensors.read_header(path)
        promised = {key for key, place in files.items() if place == file}
        for key in sorted(promised ^ set(found)):
            has, names = ("lacks", "has") if key in promised else ("has", "lacks")
            raise ValueError(
                f'{file} {has} "{key}", which {INDEX} {names} there. Received: {len(found)} '
                f"tensors in the file and {len(promised)} in the index."
            )
        tensors |= found
    return tensors


def load_backbone(backbone, config, tensors, head=True):
    """Fills an `XLSTMBackbone`. Without `head=True` it may be that of an `xLSTMModel`,
    which has no head: ours keeps the one that it was drawn with."""
    fused = _weight_mode(config.get("weight_mode", "single")) == "fused"
    bare = BARE_EMBEDDING in tensors and EMBEDDING not in tensors
    has_head = HEAD in tensors or not (backbone.tie_embeddings or (bare and not head))
    embedding, prefix = (BARE_EMBEDDING, "") if bare else (EMBEDDING, "backbone.")
    load(large.table(backbone, embedding, prefix, fused, has_head), tensors, CONFIG_FILE)


def _weight_mode(mode):
    if mode not in WEIGHT_MODES:
        raise ValueError(f"`weight_mode` must be one of {WEIGHT_MODES}. Received: {mode!r}.")
    return mode


def save(
    backbone,
    folder,
    logit_soft_cap=30.0,
    tokenizer=None,
    weight_mode="single",
    max_shard_size=5,
):
    """Writes an `XLSTMBackbone` for `transformers.AutoModelForCausalLM`, tensor by tensor.

    Args:
        backbone: an `XLSTMBackbone` of large blocks. Its dtype is that of the file.
        folder: str.
        logit_soft_cap: float or `None`.
        tokenizer: an `XLSTMTokenizer`, whose ids for start, end and padding go into the
            configuration, or `None`.
        weight_mode: `"single"`, or `"fused"` for one matrix where several read the same input.
        max_shard_size: float, gigabytes a file.
    """
    check_positive(max_shard_size=max_shard_size)
    _weight_mode(weight_mode)
    config = large.their_config(backbone, logit_soft_cap, large.TRANSFORMERS)
    for name in ("gate_soft_cap", large.LOGIT_SOFT_CAP[0]):
        if config[name] is None:
            raise ValueError(
                f"`{name}` must be a number: `transformers` opens no model without that cap. "
                "Received: None."
            )
    dtype = np.dtype(backbone.dtype_policy.variable_dtype)
    ids = (
        dict(
            bos_token_id=tokenizer.start_token_id,
            eos_token_id=tokenizer.end_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        if tokenizer is not None
        else dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    )
    config |= ids | {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": "xlstm",
        "num_blocks": backbone.num_layers,
        "embedding_dim": backbone.hidden_dim,
        "tie_word_embeddings": backbone.tie_embeddings,
        "weight_mode": weight_mode,
        "dtype": dtype.name,
    }
    if backbone.chunk_size is not None:
        config["chunk_size"] = backbone.chunk_size
    # Also a tied head is written: `transformers` would draw a random one in its place.
    weights = large.table(backbone, EMBEDDING, fused=weight_mode == "fused")
    with saving(folder) as new:
        _write_json(new, CONFIG_FILE, config)
        write_shards(weights, dtype, new, max_shard_size * GIGABYTE)


def write_shards(weights, dtype, folder, max_bytes):
    """Writes one file, or several and the index that `transformers` gives them."""
    lists, index = shards(weights, dtype, max_bytes), {}
    for n, part in enumerate(lists, start=1):
        file = SINGLE if len(lists) == 1 else f"model-{n:05}-of-{len(lists):05}.safetensors"
        specs = {weight.key: (dtype, weight.shape) for weight in part}
        arrays = (weight.value(dtype) for weight in part)
        safetensors.write(os.path.join(folder, file), specs, arrays)
        index |= dict.fromkeys(specs, file)
    if len(lists) > 1:
        sizes = (np.prod(weight.shape) * dtype.itemsize for weight in weights)
        metadata = {"total_size": int(sum(sizes))}
        _write_json(folder, INDEX, {"metadata": metadata, "weight_map": index})


def _write_json(folder, file, content):
    with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, ensure_ascii=False)
