"""Models of the 2024 paper, as NX-AI's `xlstm` package writes them: `xLSTMLMModel` and
`xLSTMBlockStack`.

What differs from ours:

- The projections of the sLSTM's input and forget gates carry each other's names, for ever, so
  that old checkpoints stay valid. The biases and recurrent kernels have the right order.
- The sLSTM's recurrent kernel and bias are laid out for one of two implementations. The shape of
  the kernel tells which:

    `vanilla`  kernel (NH, 4 DH, DH) from (NH, 4, out, in)   bias (4 NH DH) from (4, NH, DH)
    `cuda`     kernel (NH, DH, 4 DH) from (NH, in, 4, out)   bias (4 NH DH) from (NH, 4, DH)
"""

import numpy as np

from keras_xlstm.converters.large import number, refuse
from keras_xlstm.converters.weights import FLAT, SAME, TRANSPOSED, Layout, Weight, as_array

EMBEDDING, HEAD, STACK = "token_embedding.weight", "lm_head.weight", "xlstm_block_stack."
RECURRENT_KERNEL = "_recurrent_kernel_"
NORM_EPSILON = 1e-5  # fixed in the package

HEADWISE = Layout(lambda x: x.swapaxes(1, 2), lambda x, shape: x.swapaxes(1, 2))
CONV = Layout(lambda x: x.T[:, None], lambda x, shape: x[:, 0].T)


def _vanilla_kernel(x):
    NH, DH = x.shape[:2]
    return x.transpose(0, 2, 3, 1).reshape(NH, 4 * DH, DH)


def _from_vanilla_kernel(x, shape):
    NH, DH = shape[:2]
    return x.reshape(NH, 4, DH, DH).transpose(0, 3, 1, 2)


SLSTM_LAYOUTS = {  # of the recurrent kernel, and of the bias
    "vanilla": (Layout(_vanilla_kernel, _from_vanilla_kernel), FLAT),
    "cuda": (
        Layout(lambda x: x.reshape(*x.shape[:2], -1), lambda x, shape: x.reshape(shape)),
        Layout(
            lambda x: x.swapaxes(0, 1).reshape(-1),
            lambda x, shape: x.reshape(shape[1], 4, shape[2]).swapaxes(0, 1),
        ),
    ),
}


def slstm_layout(tensors):
    """Which of `SLSTM_LAYOUTS` a checkpoint has; `"vanilla"` if it has no sLSTM."""
    for key, x in tensors.items():
        if key.endswith(RECURRENT_KERNEL) and len(x.shape) == 3:
            return "vanilla" if x.shape[1] > x.shape[2] else "cuda"
    return "vanilla"


def stack_config(config, file):
    """The arguments that `XLSTMBlockStack` and `XLSTMBackbone` share, of a configuration.

    Args:
        config: dict, an `xLSTMBlockStackConfig` or `xLSTMLMModelConfig` with nested dicts.
        file: str, where it stands, for errors.
    """
    refuse(config, dict(bias=False, add_post_blocks_norm=True), file)
    num_layers = number(config, "num_blocks", 1, file)
    slstm_at = config.get("slstm_at") or []
    blocks = {
        "mlstm_block": _mlstm_block(_nested(config, "mlstm_block", file), file),
        "slstm_block": _slstm_block(_nested(config, "slstm_block", file), file),
    }
    if slstm_at == "all" or config.get("mlstm_block") is None:
        slstm_at = range(num_layers)
    elif isinstance(slstm_at, str) or not all(isinstance(i, int) for i in slstm_at):
        raise ValueError(
            f"{file}: `slstm_at` must be a list of layer indices, or 'all'. Received: {slstm_at!r}."
        )
    return {
        "num_layers": num_layers,
        "hidden_dim": number(config, "embedding_dim", 128, file),
        "slstm_at": list(slstm_at),
        "block_style": "original",
        "norm_epsilon": NORM_EPSILON,
        "num_heads": blocks["mlstm_block"]["num_heads"],
        **blocks,
    }


def _nested(config, name, file):
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{file}: `{name}` must hold names and values. Received: {value!r}.")
    return value


def _mlstm_block(config, file):
    layer = _nested(config, "mlstm", file)
    refuse(layer, dict(bias=False, round_proj_up_dim_up=True), file)
    return {
        "num_heads": number(layer, "num_heads", 4, file),
        "conv_kernel_size": number(layer, "conv1d_kernel_size", 4, file),
        "qkv_block_size": number(layer, "qkv_proj_blocksize", 4, file),
        "proj_factor": number(layer, "proj_factor", 2.0, file),
        "proj_round_up_to": number(layer, "round_proj_up_to_multiple_of", 64, file),
    }


def _slstm_block(config, file):
    layer = _nested(config, "slstm", file)
    refuse(layer, dict(group_norm_weight=True, function="slstm", forward_clipval=None), file)
    if "feedforward" in config and config["feedforward"] is None:
        raise ValueError(
            f"{file}: `slstm_block` must have a `feedforward`: keras_xlstm has no sLSTM block "
            "without. Received: feedforward=None."
        )
    ffn = _nested(config, "feedforward", file)
    refuse(
        ffn, dict(bias=False, act_fn="gelu", ff_type="ffn_gated", round_proj_up_dim_up=True), file
    )
    kernel_size = layer.get("conv1d_kernel_size", 4)
    return {
        "num_heads": number(layer, "num_heads", 4, file),
        "conv_kernel_size": kernel_size and number(layer, "conv1d_kernel_size", 4, file),
        "ffn_dim_factor": number(ffn, "proj_factor", 1.3, file),
        "ffn_round_up_to": number(ffn, "round_proj_up_to_multiple_of", 64, file),
    }


def their_config(stack, width, layout):
    """The configuration of an `xLSTMBlockStack` for an `XLSTMBlockStack` of original blocks."""
    blocks = [block.get_config() for block in stack.blocks]
    mlstm = [block for i, block in enumerate(blocks) if i not in stack.slstm_at]
    slstm = [block for i, block in enumerate(blocks) if i in stack.slstm_at]
    theirs = {
        "num_blocks": stack.num_blocks,
        "embedding_dim": width,
        "slstm_at": list(stack.slstm_at),
        "bias": False,
        "add_post_blocks_norm": True,
        "mlstm_block": None,
        "slstm_block": None,
    }
    if stack.norm_epsilon != NORM_EPSILON or any(
        block["norm_epsilon"] != NORM_EPSILON for block in blocks
    ):
        raise ValueError(
            f"`norm_epsilon` must be {NORM_EPSILON}: the `xlstm` package knows no other. "
            f"Received: norm_epsilon={stack.norm_epsilon}."
        )
    if mlstm and not mlstm[0]["conv_kernel_size"]:
        raise ValueError(
            "`conv_kernel_size` of the mLSTM blocks must be positive: the `xlstm` package cannot "
            "leave their convolution out. Received: conv_kernel_size=0."
        )
    if mlstm:
        layer = {
            "num_heads": mlstm[0]["num_heads"],
            "conv1d_kernel_size": mlstm[0]["conv_kernel_size"],
            "qkv_proj_blocksize": mlstm[0]["qkv_block_size"],
            "proj_factor": mlstm[0]["proj_factor"],
            "round_proj_up_to_multiple_of": mlstm[0]["proj_round_up_to"],
        }
        theirs["mlstm_block"] = {"mlstm": layer}
    if slstm:
        layer = {
            "num_heads": slstm[0]["num_heads"],
            "conv1d_kernel_size": slstm[0]["conv_kernel_size"],
            "backend": layout,
            "dtype": "float32",
        }
        ffn = {
            "proj_factor": slstm[0]["ffn_dim_factor"],
            "round_proj_up_to_multiple_of": slstm[0]["ffn_round_up_to"],
            "act_fn": "gelu",
        }
        theirs["slstm_block"] = {"slstm": layer, "feedforward": ffn}
    return theirs


def table(stack, layout, prefix="", embedding=None, tied=False):
    """All weights of a model.

    Args:
        stack: an `XLSTMBlockStack` of original blocks.
        layout: str, one of `SLSTM_LAYOUTS`.
        prefix: str, of the names in the stack.
        embedding: the `token_embedding` of a language model around the stack.
    """
    weights = []
    if embedding is not None:
        weights.append(Weight(EMBEDDING, (embedding, "embeddings", SAME)))
        part = ("embeddings", SAME) if tied else ("reverse_embeddings", TRANSPOSED)
        weights.append(Weight(HEAD, (embedding, *part)))
    for i, block in enumerate(stack.blocks):
        name = f"{prefix}blocks.{i}."
        weights.append(Weight(f"{name}xlstm_norm.weight", (block.norm, "gamma", SAME)))
        is_slstm = i in stack.slstm_at
        weights += _slstm(block, name, layout) if is_slstm else _mlstm(block, f"{name}xlstm.")
    norm = Weight(f"{prefix}post_blocks_norm.weight", (stack.norm, "gamma", SAME))
    return [*weights, norm]


def _mlstm(block, prefix):
    yield Weight(f"{prefix}learnable_skip", (block, "skip", SAME))
    yield Weight(f"{prefix}proj_up.weight", (block.up, "kernel", TRANSPOSED))
    for name, layer in (("q", block.query), ("k", block.key), ("v", block.value)):
        yield Weight(f"{prefix}{name}_proj.weight", (layer.dense, "kernel", HEADWISE))
    yield from _conv(block.conv, prefix) if block.conv_kernel_size else ()
    for name, gate in (("igate", block.input_gate), ("fgate", block.forget_gate)):
        yield Weight(f"{prefix}mlstm_cell.{name}.weight", (gate, "kernel", TRANSPOSED))
        yield Weight(f"{prefix}mlstm_cell.{name}.bias", (gate, "bias", SAME))
    yield Weight(f"{prefix}mlstm_cell.outnorm.weight", (block.head_norm, "scale", FLAT))
    yield Weight(f"{prefix}proj_down.weight", (block.down, "kernel", TRANSPOSED))


def _slstm(block, prefix, layout):
    kernel, bias = SLSTM_LAYOUTS[layout]
    yield from _conv(block.conv, f"{prefix}xlstm.") if block.conv_kernel_size else ()
    for name, layer in (
        ("fgate", block.input_gate),  # swapped, see above
        ("igate", block.forget_gate),
        ("zgate", block.cell_input),
        ("ogate", block.output_gate),
    ):
        yield Weight(f"{prefix}xlstm.{name}.weight", (layer.dense, "kernel", HEADWISE))
    cell = f"{prefix}xlstm.slstm_cell."
    yield Weight(f"{cell}{RECURRENT_KERNEL}", (block.recurrence, "recurrent_kernel", kernel))
    yield Weight(f"{cell}_bias_", (block.recurrence, "bias", bias))
    yield Weight(f"{prefix}xlstm.group_norm.weight", (block.head_norm, "scale", FLAT))
    yield Weight(f"{prefix}ffn_norm.weight", (block.ffn_norm, "gamma", SAME))
    parts = ((layer, "kernel", TRANSPOSED) for layer in (block.ffn.gate, block.ffn.up))
    yield Weight(f"{prefix}ffn.proj_up.weight", *parts)
    yield Weight(f"{prefix}ffn.proj_down.weight", (block.ffn.down, "kernel", TRANSPOSED))


def _conv(conv, prefix):
    yield Weight(f"{prefix}conv1d.conv.weight", (conv, "kernel", CONV))
    yield Weight(f"{prefix}conv1d.conv.bias", (conv, "bias", SAME))


def state_to_ours(stack, state):
    """The state that `xLSTMBlockStack.step` returns, as ours.

    The package divides k by sqrt(DH), ours q: C and n differ by that factor. Its convolution
    keeps one row too many.
    """
    ours = []
    for i, block in enumerate(stack.blocks):
        _check_theirs(state, i, block, i in stack.slstm_at)
        theirs = {
            name: list(map(as_array, x)) for name, x in state[f"block_{i}"].items() if x is not None
        }
        conv = [theirs["conv_state"][0][:, 1:]] if block.conv_kernel_size else []
        NH, DH = block.num_heads, block.head_dim
        if i in stack.slstm_at:
            h = [x.reshape(-1, NH, DH) for x in theirs["slstm_state"]]
        else:
            C, n, m = theirs["mlstm_state"]
            h = [C * DH**0.5, n.reshape(-1, NH, DH) * DH**0.5, m.reshape(-1, NH)]
        ours.append([*conv, *h])
    return ours


def _check_theirs(state, i, block, is_slstm):
    wanted = {"conv_state": 1} if block.conv_kernel_size else {}
    wanted |= {"slstm_state": 4} if is_slstm else {"mlstm_state": 3}
    entry = state.get(f"block_{i}") if isinstance(state, dict) else None
    entry = entry if isinstance(entry, dict) else {}
    counts = {name: len(x) for name, x in entry.items() if x is not None}
    if any(counts.get(name) != count for name, count in wanted.items()):
        raise ValueError(
            f"`state` must be what `xLSTMBlockStack.step` returned, with {wanted} tensors in "
            f"'block_{i}'. Received: {counts}."
        )


def state_to_theirs(stack, state):
    """The reverse, in NumPy arrays."""
    theirs = {}
    for i, (block, tensors) in enumerate(zip(stack.blocks, state, strict=True)):
        tensors = [as_array(x) for x in tensors]
        conv, *h = tensors if block.conv_kernel_size else (None, *tensors)
        if conv is not None:  # the first row is dropped before it is used
            conv = (np.concatenate([np.zeros_like(conv[:, :1]), conv], axis=1),)
        DH = block.head_dim
        if i in stack.slstm_at:
            entry = {"slstm_state": np.stack([x.reshape(len(x), -1) for x in h])}
        else:
            C, n, m = h
            entry = {"mlstm_state": (C * DH**-0.5, n[..., None] * DH**-0.5, m[..., None, None])}
        theirs[f"block_{i}"] = entry | {"conv_state": conv}
    return theirs
