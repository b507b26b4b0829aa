import keras
from keras_hub.models import CausalLMPreprocessor, Tokenizer

from keras_xlstm.files import saving
from keras_xlstm.models.backbone import XLSTMBackbone
from keras_xlstm.models.generation import check_texts
from keras_xlstm.models.tokenizer import XLSTMTokenizer
from keras_xlstm.ops.checks import check_positive_int, given


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMCausalLMPreprocessor(CausalLMPreprocessor):
    """Turns strings into token ids, padded on the right, and into next-token targets.

    Args:
        tokenizer: an `XLSTMTokenizer`.
        sequence_length: int, the padded length.
        add_start_token: bool, whether a text, or a prompt, starts with the start token.
        add_end_token: bool, whether a text ends with the end token. A prompt never does.

    Example:

    ```python
    preprocessor = XLSTMCausalLMPreprocessor(XLSTMTokenizer.byte_level(), sequence_length=32)
    x, y, sample_weight = preprocessor(["one text", "another"])
    ```
    """

    backbone_cls = XLSTMBackbone
    tokenizer_cls = XLSTMTokenizer

    def __init__(self, tokenizer, sequence_length=1024, **kwargs):
        check_positive_int(sequence_length=sequence_length)
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(
                "`tokenizer` must be a tokenizer, such as `XLSTMTokenizer.byte_level()`. "
                f"Received: {type(tokenizer).__name__}."
            )
        super().__init__(tokenizer, sequence_length, **kwargs)

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        check_positive_int(**given(sequence_length=sequence_length))
        check_texts("x", x)
        return super().call(x, y, sample_weight, sequence_length)

    def generate_preprocess(self, x, sequence_length=None):
        check_positive_int(**given(sequence_length=sequence_length))
        check_texts("x", x)
        return super().generate_preprocess(x, sequence_length)

    def save_to_preset(self, preset_dir):
        """As in KerasHub, but all or nothing."""
        with saving(preset_dir) as folder:
            super().save_to_preset(folder)

    def export_to_transformers(self, path):
        """Writes the tokenizer for `transformers.AutoTokenizer`.

        Args:
            path: str, the folder.
        """
        self.tokenizer.export_to_transformers(path)

    def _generate_preprocess_python(self, x, sequence_length=None):
        # KerasHub starts every prompt with the start token, also where no text did in training.
        if not self.built:
            self.build(None)
        token_ids, padding_mask = self.packer(
            self.tokenizer(x),
            sequence_length=sequence_length,
            add_start_value=self.add_start_token,
            add_end_value=False,
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}
