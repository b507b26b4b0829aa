"""Where the tokens of prompts of different lengths stand while they are continued.

KerasHub's samplers move one column at a time through all rows: `next(prompt, cache, index)` reads
column `index - 1` and gives the logits of column `index`. A recurrent state can neither skip a
column nor take one twice, so all prompts must end at one column. With B rows of length T, prompts
of `r` tokens that fit into P columns, and `s = P + min(r)`:

    input, output (B, T)         buffer of the sampler (B, P + T)
    a b c x x x x x              . . . . . a b c | x x x x x - -
    d y y y y y y y              . . . . . . . d | y y y y y y y
                                              s = 8

The state has then seen every prompt but for its last token, which the first `next` reads; no row
waits for another, and the loop makes `T - min(r)` steps.
"""

from numbers import Number

import numpy as np
from keras import ops

from keras_xlstm.ops.checks import as_tensor, check_ids, repr

EMPTY = -1  # a column that is not generated yet: no token, so no stop token either
SMALLEST_BUCKET = 16


def add_prompt(inputs, vocabulary_size):
    """Adds the columns `"prompt"` (B, P) that hold all prompts; runs before compilation.

    P is a power of two, so that few compilations serve prompts of all lengths.

    Raises:
        ValueError: if a row has no prompt, or one that does not start at its left end, or a token
            is not in the vocabulary.
    """
    token_ids = check_inputs("inputs", inputs, vocabulary_size)
    mask = as_tensor("padding_mask", inputs["padding_mask"], "flag")
    mask = np.asarray(ops.convert_to_numpy(mask))
    token_ids = np.asarray(ops.convert_to_numpy(token_ids))
    check_ids("token_ids", token_ids, vocabulary_size)
    if token_ids.shape != mask.shape or len(mask) == 0:
        raise ValueError(
            "`token_ids` and `padding_mask` must both have the shape (batch, length), and at least "
            f"one row. Received: token_ids.shape={token_ids.shape}, "
            f"padding_mask.shape={mask.shape}."
        )
    token_ids = ops.convert_to_tensor(token_ids, "int32")
    T, lengths = mask.shape[1], mask.sum(1)
    is_prefix = (mask == (np.arange(T) < lengths[:, None])).all(1)
    bad = np.flatnonzero(~is_prefix | (lengths == 0))
    if bad.size:
        raise ValueError(
            "Every prompt must have at least one token and stand at the left end of its row, with "
            "the padding behind it: `padding_mask` is 1, ..., 1, 0, ..., 0. Received: "
            f"padding_mask[{bad[0]}]={mask[bad[0]].astype(int)}. Pad on the right; to generate "
            "from nothing, start with the start token."
        )
    P = min(T, max(SMALLEST_BUCKET, 1 << int(lengths.max() - 1).bit_length()))
    mask = ops.convert_to_tensor(mask)
    return {"token_ids": token_ids, "padding_mask": mask, "prompt": token_ids[:, :P]}


def check_inputs(name, inputs, vocabulary_size):
    """Checks what a model without a preprocessor takes, and returns its token ids.

    Raises:
        ValueError: if it is something else. Of what is on a device, token ids are not looked at.
    """
    if not isinstance(inputs, dict) or not {"token_ids", "padding_mask"} <= set(inputs):
        received = f"a dict of {sorted(inputs)}" if isinstance(inputs, dict) else repr(inputs)
        raise ValueError(
            f"`{name}` must be a dict of `token_ids` and `padding_mask`, as this model has no "
            f"preprocessor that makes them of texts. Received: {received}."
        )
    return check_ids("token_ids", inputs["token_ids"], vocabulary_size)


def check_texts(name, texts):
    """Checks what a model with a preprocessor takes. Data sets and tensors are not looked at.

    Raises:
        ValueError: if it is nothing of which a tokenizer makes token ids.
    """
    numbers_only = isinstance(texts, np.ndarray) and texts.dtype.kind not in "OUS"
    good = not (texts is None or numbers_only or isinstance(texts, (dict, Number)))
    if isinstance(texts, (list, tuple)):
        good = len(texts) > 0 and all(isinstance(text, (str, bytes)) for text in texts)
    if not good:
        raise ValueError(
            f"`{name}` must be texts, at least one. Received: {repr(texts)}. For token ids, make "
            "the model with `preprocessor=None`."
        )


class Alignment:
    """The move of prompts of given lengths from the left to one common end, and back.

    Args:
        lengths: int tensor, (B,).
        prompt_length: int, P.
        max_length: int, T.
    """

    def __init__(self, lengths, prompt_length, max_length):
        self.max_length = max_length
        self.start = prompt_length + ops.min(lengths)  # s
        self.last = (lengths - 1)[:, None]
        self.budget = max_length - lengths  # tokens that each row may still take
        self.shift = (self.start - lengths)[:, None]
        columns = ops.arange(prompt_length + max_length, dtype="int32")[None]
        self.source = ops.clip(columns - self.shift, 0, self.last)  # (B, P + T)
        self.is_prompt = ops.broadcast_to(columns < self.start, ops.shape(self.source))

    def right(self, x):
        """(B, P, ...) to (B, P + T, ...). Where no prompt is, the row's nearest value repeats."""
        source = self.source
        for _ in x.shape[2:]:
            source = source[..., None]
        return ops.take_along_axis(x, source, axis=1)

    def left(self, x):
        """(B, P + T) to (B, T)."""
        columns = ops.arange(self.max_length, dtype="int32")[None]
        return ops.take_along_axis(x, columns + self.shift, axis=1)


def is_any(token_ids, values):
    """Where a token is one of the ids in `values`."""
    return ops.any(token_ids[..., None] == ops.array(values, "int32"), axis=-1)
