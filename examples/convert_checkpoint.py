"""Converts a checkpoint between Keras, `transformers` and NX-AI's `xlstm`.

    python examples/convert_checkpoint.py hf://NX-AI/xLSTM-7b preset --to keras --dtype bfloat16
    python examples/convert_checkpoint.py preset folder --to transformers --weight-mode fused
    python examples/convert_checkpoint.py folder another --to xlstm

The source is a folder that any of the three wrote, the name of a built-in preset, or a model on
the hub, as `hf://NX-AI/xLSTM-7b`. Afterwards the target is opened, and its logits are compared with
the source's. A source stays as it is; a target must not exist. Takes the memory of two models.
"""

import argparse
import os
import sys

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from keras import ops

from keras_xlstm.converters import from_xlstm, to_xlstm
from keras_xlstm.models import XLSTMCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("target", help="a folder to be made")
    parser.add_argument("--to", choices=TARGETS, required=True)
    parser.add_argument("--dtype", help="of the weights in memory and in the target")
    parser.add_argument("--weight-mode", choices=("single", "fused"), default="single")
    parser.add_argument("--slstm-layout", choices=("vanilla", "cuda"), default="vanilla")
    options = parser.parse_args()
    if os.path.exists(options.target):
        sys.exit(f"The target must not exist, so that nothing is overwritten: {options.target}")

    lm = load(options.source, options.dtype)
    TARGETS[options.to](lm, options)
    files = [entry for entry in os.scandir(options.target) if entry.is_file()]
    size = sum(entry.stat().st_size for entry in files)
    print(f"{lm.count_params():,} parameters, {size / 1e6:.1f} MB in {len(files)} files")
    difference = np.abs(logits(load(options.target, options.dtype)) - logits(lm)).max()
    print(f"largest difference of a logit after opening the target: {difference:.1e}")


def load(source, dtype):
    options = {"dtype": dtype} if dtype else {}
    if os.path.exists(os.path.join(source, "config.yaml")):
        lm = from_xlstm(source, **options)
        if not isinstance(lm, XLSTMCausalLM):
            sys.exit(f"{source} holds a stack of blocks alone: use keras_xlstm.converters.")
        return lm
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "tokenizer.json")):
        print(f"{source} has no tokenizer.")
        options["preprocessor"] = None
    return XLSTMCausalLM.from_preset(source, **options)


def to_keras(lm, options):
    lm.save_to_preset(options.target)


def to_transformers(lm, options):
    lm.export_to_transformers(options.target, weight_mode=options.weight_mode)


def to_xlstm_package(lm, options):
    to_xlstm(lm, options.target, slstm_layout=options.slstm_layout)


TARGETS = {"keras": to_keras, "transformers": to_transformers, "xlstm": to_xlstm_package}


def logits(lm):
    ids = np.arange(24).reshape(2, 12) % lm.backbone.token_embedding.input_dim
    return ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


if __name__ == "__main__":
    main()
