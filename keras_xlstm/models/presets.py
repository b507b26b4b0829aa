"""Built-in presets: what `from_preset` knows by name, in the form of KerasHub's own tables."""

from pathlib import Path

from keras_hub.src.utils.preset_utils import register_presets

from keras_xlstm.models.backbone import XLSTMBackbone

FILES = Path(__file__).with_name("preset_files")


def tiny(name, params, what):
    return {
        "metadata": {
            "description": (
                f"2 blocks {what}, width 16, bytes for tokens. To try things out: it has no "
                "weights, so load it with `load_weights=False`."
            ),
            "params": params,
            "path": "xlstm",
        },
        "kaggle_handle": str(FILES / name),
    }


backbone_presets = {
    "xlstm_7b": {
        "metadata": {
            "description": (
                "32 mLSTM blocks, trained on 2.3 trillion tokens of text. By NX-AI, under the "
                "licence that its page states: https://huggingface.co/NX-AI/xLSTM-7b."
            ),
            "params": 6865424896,
            "path": "xlstm",
        },
        "kaggle_handle": "hf://NX-AI/xLSTM-7b",
    },
    "xlstm_tiny": tiny("xlstm_tiny", 15668, "of the 7B model's style, an mLSTM and an sLSTM"),
    "xlstm_tiny_original": tiny(
        "xlstm_tiny_original", 17636, "of the 2024 paper, an mLSTM and an sLSTM"
    ),
}


def register():
    register_presets(backbone_presets, XLSTMBackbone)
