"""The language model of xLSTM-7B, as `transformers` (`model_type: xlstm`) and NX-AI's `xLSTMLarge`
write it: the weights have one table, but for the name of the embedding, the configurations differ.
"""

import contextlib
import math
import numbers

from keras_xlstm.converters.weights import FLAT, SAME, TRANSPOSED, Weight

# Ours: (theirs in `transformers`, theirs in `xLSTMLarge`, the default of both).
CONFIG = {
    "vocabulary_size": ("vocab_size", "vocab_size", 50304),
    "num_layers": ("num_hidden_layers", "num_blocks", 32),
    "hidden_dim": ("hidden_size", "embedding_dim", 4096),
    "num_heads": ("num_heads", "num_heads", 8),
    "qk_dim_factor": ("qk_dim_factor", "qk_dim_factor", 0.5),
    "v_dim_factor": ("v_dim_factor", "v_dim_factor", 1.0),
    "ffn_dim_factor": ("ffn_proj_factor", "ffn_proj_factor", 2.667),
    "ffn_round_up_to": ("ffn_round_up_to_multiple_of", "ffn_round_up_to_multiple_of", 64),
    "gate_soft_cap": ("gate_soft_cap", "gate_soft_cap", 15.0),
    "norm_epsilon": ("norm_eps", "norm_eps", 1e-6),
    "denominator_epsilon": ("eps", "eps", 1e-6),
}
TRANSFORMERS, XLSTM_LARGE = 0, 1
PACKAGE_FFN_FACTOR = 2.6667  # of `xLSTMLarge`, in which alone it differs
LOGIT_SOFT_CAP = "output_logit_soft_cap", 30.0


def backbone_config(config, form, file):
    """The arguments of `XLSTMBackbone` for a configuration in either form.

    Args:
        config: dict, theirs.
        form: `TRANSFORMERS` or `XLSTM_LARGE`.
        file: str, where it stands, for errors.
    """
    ours = {}
    for name, entry in CONFIG.items():
        default = (
            PACKAGE_FFN_FACTOR if (name, form) == ("ffn_dim_factor", XLSTM_LARGE) else entry[2]
        )
        ours[name] = number(config, entry[form], default, file, name != "gate_soft_cap")
    if form == TRANSFORMERS:
        for name, synonym in (("num_layers", "num_blocks"), ("hidden_dim", "embedding_dim")):
            theirs = CONFIG[name][form]
            other = number(config, synonym, None, file, required=False)
            if other is None or other == ours[name]:
                continue
            if theirs in config:
                raise ValueError(
                    f"{file}: `{theirs}` and `{synonym}` are one number. Received: "
                    f"{ours[name]} and {other}."
                )
            ours[name] = other
    refuse(config, dict(use_bias=False), file)
    if form == XLSTM_LARGE:
        refuse(config, dict(add_out_norm=True), file)
    return ours


def logit_soft_cap(config, file):
    return number(config, *LOGIT_SOFT_CAP, file, required=False)


def their_config(backbone, logit_soft_cap, form):
    """The configuration, in either form, of an `XLSTMBackbone` with blocks of the 7B model."""
    if backbone.block_style != "large" or backbone.slstm_at:
        raise ValueError(
            "This format holds models of large blocks without sLSTM only. Received: "
            f"block_style={backbone.block_style!r}, slstm_at={backbone.slstm_at}. Models of the "
            "2024 paper's blocks leave by `keras_xlstm.converters.to_xlstm`."
        )
    theirs = {entry[form]: getattr(backbone, name) for name, entry in CONFIG.items()}
    return theirs | {LOGIT_SOFT_CAP[0]: logit_soft_cap}


def number(config, name, default, file, required=True):
    """`config[name]`, checked to be a positive number of the default's kind; or the default."""
    value = config.get(name, default)
    if value is None and not required:
        return None
    if isinstance(value, str):  # YAML reads 1e-6, without a point, as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    whole = isinstance(default, int)
    good = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value <= 0 or (whole and value != int(value)):
        kind = "whole number" if whole else "number"
        raise ValueError(f"{file}: `{name}` must be a positive {kind}. Received: {value!r}.")
    return int(value) if whole else float(value)


def refuse(config, expected, file):
    """Raises `ValueError` for what `keras_xlstm` has no layers for."""
    for name, value in expected.items():
        if name in config and config[name] != value:
            raise ValueError(
                f"{file}: `{name}` must be {value!r}: keras_xlstm has no such layers. Received: "
                f"{name}={config[name]!r}."
            )


def table(backbone, embedding, prefix="backbone.", fused=False, head=True):
    """All weights of a model.

    Args:
        backbone: an `XLSTMBackbone`, or what else has its `token_embedding` and `stack`.
        embedding: str, the name of the embedding's tensor.
        prefix: str, of all other names but that of the head.
        fused: bool, whether tensors that read the same input are one (`weight_mode="fused"`).
        head: bool, whether the checkpoint has a head.
    """
    weights = [Weight(embedding, (backbone.token_embedding, "embeddings", SAME))]
    for i, block in enumerate(backbone.stack.blocks):
        weights += _block(block, f"{prefix}blocks.{i}.", fused)
    weights.append(Weight(f"{prefix}out_norm.weight", (backbone.stack.norm, "scale", SAME)))
    if head:
        tied = backbone.token_embedding.tie_weights
        part = ("embeddings", SAME) if tied else ("reverse_embeddings", TRANSPOSED)
        weights.append(Weight("lm_head.weight", (backbone.token_embedding, *part)))
    return weights


def _block(block, prefix, fused):
    def dense(name, *layers):
        return Weight(f"{prefix}{name}.weight", *((x, "kernel", TRANSPOSED) for x in layers))

    def bias(name, *layers):
        return Weight(f"{prefix}{name}.bias", *((x, "bias", SAME) for x in layers))

    cell, ffn = block.mixer.cell, block.ffn
    yield Weight(f"{prefix}norm_mlstm.weight", (block.norm, "scale", SAME))
    if fused:
        yield dense("mlstm_layer.qkv_opreact", cell.query, cell.key, cell.value, cell.output_gate)
        yield dense("mlstm_layer.ifgate_preact", cell.input_gate, cell.forget_gate)
        yield bias("mlstm_layer.ifgate_preact", cell.input_gate, cell.forget_gate)
    else:
        yield dense("mlstm_layer.q", cell.query)
        yield dense("mlstm_layer.k", cell.key)
        yield dense("mlstm_layer.v", cell.value)
        yield dense("mlstm_layer.ogate_preact", cell.output_gate)
        yield dense("mlstm_layer.igate_preact", cell.input_gate)
        yield bias("mlstm_layer.igate_preact", cell.input_gate)
        yield dense("mlstm_layer.fgate_preact", cell.forget_gate)
        yield bias("mlstm_layer.fgate_preact", cell.forget_gate)
    yield Weight(f"{prefix}mlstm_layer.multihead_norm.weight", (cell.norm, "scale", FLAT))
    yield dense("mlstm_layer.out_proj", cell.output_projection)
    yield Weight(f"{prefix}norm_ffn.weight", (block.ffn_norm, "scale", SAME))
    if fused:
        yield dense("ffn.proj_up_gate_z", ffn.gate, ffn.up)
    else:
        yield dense("ffn.proj_up_gate", ffn.gate)
        yield dense("ffn.proj_up", ffn.up)
    yield dense("ffn.proj_down", ffn.down)
