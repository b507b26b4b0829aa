"""The byte-pair tokenizer of GPT-NeoX, which xLSTM-7B uses: `tokenizer.json` to ours and back."""

import json
import os

from keras_xlstm.files import saving

TOKENIZER_FILE, TOKENIZER_CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"


def tokenizer_config(path):
    """The arguments of `XLSTMTokenizer` for a `tokenizer.json`.

    Added tokens, such as GPT-NeoX' runs of spaces, take part as tokens that are never split.

    Raises:
        ValueError: if it is not byte-level byte-pair encoding.
    """
    try:
        with open(path, encoding="utf-8") as f:
            return _config(json.load(f))
    except (AttributeError, KeyError, TypeError) as e:
        reason = f"{type(e).__name__} {e}"
    except (RecursionError, ValueError) as e:
        reason = str(e)
    raise ValueError(f"{path} is not the file of a tokenizer that this can open: {reason}.")


def _config(content):
    model = content.get("model") or {}
    pre_tokenizer = content.get("pre_tokenizer") or {}
    kinds = model.get("type", "BPE"), pre_tokenizer.get("type")
    if kinds != ("BPE", "ByteLevel") or not pre_tokenizer.get("use_regex", True):
        raise ValueError(
            f"{TOKENIZER_FILE} must hold a model of type BPE behind a pre-tokenizer of type "
            f"ByteLevel, as GPT-NeoX' does. Received: {kinds[0]} behind {kinds[1]}."
        )
    vocabulary = dict(model["vocab"])
    added = [token["content"] for token in content.get("added_tokens") or ()]
    vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in model["merges"]]
    if not all(isinstance(x, int) for x in vocabulary.values()):
        raise ValueError("each token must have a whole number as its id")
    return {
        "vocabulary": vocabulary,
        "merges": merges,
        "add_prefix_space": pre_tokenizer.get("add_prefix_space", False),
        "unsplittable_tokens": sorted(added) or None,
    }


def save(tokenizer, folder):
    """Writes an `XLSTMTokenizer` for `transformers.AutoTokenizer`."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": tokenizer.add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }
    vocabulary = tokenizer.vocabulary
    special = {tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token}
    added = sorted({*tokenizer.unsplittable_tokens, *special}, key=vocabulary.__getitem__)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token in special,
            }
            for token in added
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(vocabulary),
            "merges": [rule for rule in tokenizer.merges if not rule.startswith("#version")],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.start_token,
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
    }
    with saving(folder) as new:
        for file, value in ((TOKENIZER_FILE, content), (TOKENIZER_CONFIG_FILE, config)):
            with open(os.path.join(new, file), "w", encoding="utf-8") as f:
                json.dump(value, f, indent=2, ensure_ascii=False)
