"""Loads what `test_presets.py` saved, under another backend, and writes its logits.

KERAS_BACKEND=torch python other_backend.py FOLDER
"""

import pathlib
import sys

import keras
import keras_hub
import numpy as np

import keras_xlstm.models  # noqa: F401 - registers the classes

folder = pathlib.Path(sys.argv[1])
logits = {}
for style in ("large", "original"):
    token_ids = np.load(folder / "token_ids.npy")
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    for kind, model in (
        ("preset", keras_hub.models.CausalLM.from_preset(str(folder / style))),
        ("keras", keras.models.load_model(folder / f"{style}.keras")),
    ):
        logits[f"{style}_{kind}"] = keras.ops.convert_to_numpy(model(inputs))
np.savez(folder / f"{keras.backend.backend()}.npz", **logits)
