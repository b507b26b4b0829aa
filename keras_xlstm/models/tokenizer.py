import keras
from keras_hub.tokenizers import BytePairTokenizer
from tokenizers import pre_tokenizers

from keras_xlstm.converters import tokenizer as converter
from keras_xlstm.files import saving
from keras_xlstm.models.backbone import XLSTMBackbone

END, PADDING = "<|endoftext|>", "<|padding|>"
NO_MERGES = ["#version: 0.2"]  # the head line of a merges file; TensorFlow has no empty table


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMTokenizer(BytePairTokenizer):
    """Byte-pair tokenizer, with GPT-2's rules for splitting text into words.

    `"<|endoftext|>"` starts and ends a text. `"<|padding|>"` pads where the vocabulary has it,
    else `"<|endoftext|>"` does.

    Args:
        vocabulary: dict from token to id, or the path of such a JSON file.
        merges: list of merge rules, or the path of a file with one rule per line.
        **kwargs: as for `keras_hub.tokenizers.BytePairTokenizer`.

    Example:

    ```python
    tokenizer = XLSTMTokenizer.byte_level()
    tokenizer.detokenize(tokenizer("any text"))  # "any text"
    ```
    """

    backbone_cls = XLSTMBackbone

    def __init__(self, vocabulary=None, merges=None, **kwargs):
        for name in ("start_token", "end_token", "pad_token"):
            self._add_special_token(END, name)
        super().__init__(vocabulary=vocabulary, merges=merges, **kwargs)

    @classmethod
    def byte_level(cls, **kwargs):
        """A tokenizer with one token a byte: ids 0 and 1 are special, byte `b` is `b + 2`."""
        tokens = [END, PADDING, *byte_symbols()]
        return cls({token: id for id, token in enumerate(tokens)}, NO_MERGES, **kwargs)

    def save_to_preset(self, preset_dir):
        """As in KerasHub, but all or nothing."""
        with saving(preset_dir) as folder:
            super().save_to_preset(folder)

    def export_to_transformers(self, path):
        """Writes `tokenizer.json` and `tokenizer_config.json` for `transformers.AutoTokenizer`.

        Args:
            path: str, the folder.
        """
        converter.save(self, path)

    def load_assets(self, dir_path):
        try:
            super().load_assets(dir_path)
        except Exception as e:  # `tokenizers` raises this very class
            raise ValueError(
                f"'{dir_path}' must hold vocabulary.json, a dict from token to id, and merges.txt, "
                f"a rule a line, of one tokenizer. Received: {e!r}. Copy or download them again."
            ) from e

    def set_vocabulary_and_merges(self, vocabulary, merges):
        if isinstance(merges, list) and not merges:
            merges = NO_MERGES
        super().set_vocabulary_and_merges(vocabulary, merges)
        ids = list((self.vocabulary or {}).values())
        if len(set(ids)) < len(ids) or not all(type(id) is int and id >= 0 for id in ids):
            bad = next(x for x in ids if type(x) is not int or x < 0 or ids.count(x) > 1)
            raise ValueError(
                "`vocabulary` must give each token a number of its own, 0 or more. "
                f"Received: the id {bad!r}{f' {ids.count(bad)} times' * (ids.count(bad) > 1)}."
            )
        if self.vocabulary and PADDING in self.vocabulary and self.pad_token != PADDING:
            # Only now is it known that there is one: it must not be split either.
            self.pad_token = PADDING
            self.unsplittable_tokens = sorted({*self.unsplittable_tokens, PADDING})
            super().set_vocabulary_and_merges(self.vocabulary, self.merges)

    def _set_vocabulary_and_merges_tokenizers(self, vocabulary, merges):
        # KerasHub splits words by Llama 3's rules here, and by GPT-2's in `tf.data`.
        super()._set_vocabulary_and_merges_tokenizers(vocabulary, merges)
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=self.add_prefix_space, use_regex=True
        )


def byte_symbols():
    """The characters that stand for bytes 0 to 255 in a byte-pair vocabulary, as in GPT-2.

    Printable bytes stand for themselves, the others are counted from character 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    symbols |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]
