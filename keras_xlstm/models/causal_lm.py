from numbers import Number

import keras
import numpy as np
from keras import ops, tree
from keras.src.quantizers.utils import should_quantize_layer
from keras_hub.models import CausalLM, CausalLMPreprocessor
from keras_hub.samplers import SpeculativeSampler

from keras_xlstm.converters import transformers
from keras_xlstm.files import saving
from keras_xlstm.layers.dense import Dense, TokenEmbedding
from keras_xlstm.layers.soft_cap import SoftCap
from keras_xlstm.models.backbone import TURN, XLSTMBackbone, check_keywords
from keras_xlstm.models.causal_lm_preprocessor import XLSTMCausalLMPreprocessor
from keras_xlstm.models.generation import (
    EMPTY,
    Alignment,
    add_prompt,
    check_inputs,
    check_texts,
    is_any,
)
from keras_xlstm.models.token_loss import TokenLoss
from keras_xlstm.ops.checks import (
    as_tensor,
    check_cap,
    check_ids,
    check_positive_int,
    check_shapes,
    given,
    is_int,
    repr,
)
from keras_xlstm.ops.linear import cross_entropy
from keras_xlstm.ops.repeated import repeated


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMCausalLM(CausalLM):
    """The xLSTM as a language model: it learns from texts and continues them.

    In a batch of prompts of different lengths each row gets what it would get alone, and each
    further token costs the same time and memory, however many came before.

    Args:
        backbone: an `XLSTMBackbone`.
        preprocessor: an `XLSTMCausalLMPreprocessor`, or `None` if inputs come as token ids.
        logit_soft_cap: float, soft cap of the logits, or `None` for none.

    Source: Beck et al. 2025, arXiv:2503.13427.

    Example:

    ```python
    tokenizer = XLSTMTokenizer.byte_level()
    lm = XLSTMCausalLM(
        XLSTMBackbone(tokenizer.vocabulary_size(), num_layers=2, hidden_dim=64, num_heads=4),
        XLSTMCausalLMPreprocessor(tokenizer, sequence_length=128),
    )
    lm.fit(["a text", "another text"])
    lm.generate(["a prompt", "a longer prompt"], max_length=32)
    ```
    """

    backbone_cls = XLSTMBackbone
    preprocessor_cls = XLSTMCausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, logit_soft_cap=30.0, **kwargs):
        _check_parts(backbone, preprocessor)
        check_cap(logit_soft_cap=logit_soft_cap)
        check_keywords(type(self), kwargs, ("name", "trainable", "dtype", "compile"))
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.logit_soft_cap = logit_soft_cap
        self.soft_cap = SoftCap(logit_soft_cap, dtype="float32", name="soft_cap")
        inputs = backbone.input
        super().__init__(inputs=inputs, outputs=self._logits(backbone(inputs)), **kwargs)

    def compile(self, optimizer="auto", loss="auto", **kwargs):
        super().compile(optimizer, TokenLoss() if loss == "auto" else loss, **kwargs)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope("full")` the blocks of the backbone are computed again."""
        return layer_call

    def fit(self, x=None, y=None, *args, **kwargs):
        self._check_data(x)
        self._check_targets(x, y)
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._check_data(x)
        self._check_targets(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        """As in Keras. Threads take turns."""
        self._check_data(x)
        with TURN:
            return super().predict(x, *args, **kwargs)

    def get_config(self):
        return super().get_config() | {"logit_soft_cap": self.logit_soft_cap}

    def quantize(self, mode=None, config=None, filters=None, **kwargs):
        """Quantizes the dense layers and, in the modes that Keras has for it, the embedding.

        Gates, states, norms and headwise projections stay as they are. Arguments as for
        `keras.Model.quantize`.
        """
        mode = mode or getattr(config, "mode", None)
        kinds = (Dense, TokenEmbedding) if mode in ("int8", "int4") else (Dense,)

        def is_wanted(layer):
            return type(layer) in kinds and should_quantize_layer(layer, filters)

        super().quantize(mode, config=config, filters=is_wanted, **kwargs)

    def get_quantization_layer_structure(self, mode=None):
        """Where GPTQ and AWQ find the blocks that they quantize one after the other."""
        if mode not in ("gptq", "awq"):
            return None
        return {
            "pre_block_layers": [self.backbone.token_embedding],
            "sequential_blocks": self.backbone.stack.blocks,
        }

    def save_to_preset(self, preset_dir, **kwargs):
        """As in KerasHub, but all or nothing: an interrupted save leaves what stood there."""
        with saving(preset_dir) as folder:
            super().save_to_preset(folder, **kwargs)

    def export_to_transformers(self, path, weight_mode="single", max_shard_size=5):
        """Writes a folder that `transformers`' AutoModelForCausalLM and AutoTokenizer open.

        Adapters are merged into the matrices that they adapt. The dtype of the files is that of
        the backbone's variables.

        Args:
            path: str, the folder.
            weight_mode: `"single"`, or `"fused"` for one matrix where several read the same input.
                AutoModelForCausalLM of `transformers` 5.23 fails on fused folders with more than
                one head, its own included.
            max_shard_size: float, gigabytes a file.
        """
        tokenizer = getattr(self.preprocessor, "tokenizer", None)
        with saving(path) as folder:
            transformers.save(
                self.backbone,
                folder,
                logit_soft_cap=self.logit_soft_cap,
                tokenizer=tokenizer,
                weight_mode=weight_mode,
                max_shard_size=max_shard_size,
            )
            if tokenizer is not None:
                tokenizer.export_to_transformers(folder)

    def call_with_cache(self, token_ids, cache, padding_mask=None):
        """Goes on from a state: by any number of tokens, and as often as one likes.

        Args:
            token_ids: int tensor, (B, S).
            cache: the states of all blocks, as returned. `None` starts afresh.
            padding_mask: bool tensor, (B, S). Where it is `False` nothing happens to the states.

        Returns:
            Logits (B, S, vocabulary_size) in float32, hidden states (B, S, hidden_dim) and the
            next cache: float32 tensors whose size does not depend on S.
        """
        token_ids = as_tensor("token_ids", self._check_ids(token_ids=token_ids), "int")
        hidden_states, cache = self._advance(token_ids, cache, padding_mask)
        return self._logits(hidden_states), hidden_states, cache

    def step_model(self, sequence_length=1):
        """A model with the state as an input and an output, for `export`.

        It lets another program, without Keras, read a prompt and continue it token by token.

        Args:
            sequence_length: int, S, tokens that it takes at a time; `None` for any number, where
                the export format allows that.

        Returns:
            A `keras.Model` from `[token_ids, *states]` to `[logits, *states]`: token ids (B, S)
            and logits (B, S, vocabulary_size) that share this model's weights. States are
            float32, named in `model.input_names`, and zero before the first token.

        Example:

        ```python
        step = lm.step_model()
        step.export("step.onnx", format="onnx")
        ```
        """
        check_positive_int(**given(sequence_length=sequence_length))
        stack = self.backbone.stack
        token_ids = keras.Input((sequence_length,), dtype="int32", name="token_ids")
        cache = [
            [
                keras.Input(shape, dtype="float32", name=f"{block.name}_{name}")
                for name, shape in block.state_shapes.items()
            ]
            for block in stack.blocks
        ]
        inputs = [token_ids, *tree.flatten(cache)]
        step = Step(self.call_with_cache, [self.backbone, self.soft_cap], cache)
        model = keras.Model(inputs, step(inputs), name=f"{self.name}_step")
        model(inputs)  # Keras exports what was called once
        return model

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """Scores given tokens.

        Args:
            token_ids: int tensor, (B, S).
            padding_mask: bool tensor, (B, S). `None` if nothing is padded.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: `fn(x, i)` gives what takes the place of the activations `x`
                (B, S, hidden_dim): of the embedding for `i = -1`, of block `i` else.
            target_ids: int tensor, (B, S), what each position should predict. Needed for `"loss"`.

        Returns:
            Logits (B, S, vocabulary_size), or the loss of each position (B, S).
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(
                f"`scoring_mode` must be 'logits' or 'loss'. Received: {scoring_mode!r}."
            )
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` needs `target_ids`. Received: None.")
        if not (layer_intercept_fn is None or callable(layer_intercept_fn)):
            raise ValueError(
                "`layer_intercept_fn` must be a function of activations and a layer's index. "
                f"Received: {layer_intercept_fn!r}."
            )
        token_ids = as_tensor("token_ids", self._check_ids(token_ids=token_ids), "int")
        mask = None if padding_mask is None else as_tensor("padding_mask", padding_mask, "flag")
        if target_ids is not None:
            target_ids = as_tensor("target_ids", self._check_ids(target_ids=target_ids), "int")
        check_shapes(
            token_ids=(token_ids, "B S"), padding_mask=(mask, "B S"), target_ids=(target_ids, "B S")
        )
        intercept = layer_intercept_fn or (lambda x, i: x)
        x = intercept(self.backbone.token_embedding(token_ids), -1)
        for i, block in enumerate(self.backbone.stack.blocks):
            x = intercept(block(x, mask=mask), i)
        logits = self._logits(self.backbone.stack.norm(x))
        if scoring_mode == "logits":
            return logits
        return cross_entropy(logits, target_ids)

    def predict_on_batch(self, x):
        """As in Keras. Threads take turns."""
        with TURN:
            return super().predict_on_batch(x)

    def generate(self, inputs, max_length=None, stop_token_ids="auto", strip_prompt=False):
        """Continues texts; as `keras_hub.models.CausalLM.generate`, with checked arguments.

        Args:
            inputs: a text or a list of texts; or, of a model without a preprocessor, a dict of
                `"token_ids"` and `"padding_mask"` (B, T), prompts at the left, where T is the
                length that they are continued to; or a data set of either.
            max_length: int, the length in tokens, the prompt's included: of a prompt that is
                longer only so much is taken. `None` for the preprocessor's `sequence_length`.
            stop_token_ids: ints, ids after any of which a row ends. `None` for none, `"auto"` for
                the tokenizer's end token.
            strip_prompt: bool, whether to return only what is new.

        Returns:
            Texts, or a dict as `inputs`.

        Raises:
            ValueError: if an argument is none of these, or a token is not in the vocabulary.
        """
        check_positive_int(**given(max_length=max_length))
        if self.preprocessor is not None:
            check_texts("inputs", inputs)
        elif not hasattr(inputs, "as_numpy_iterator"):  # a data set of TensorFlow
            check_inputs("inputs", inputs, self.backbone.vocabulary_size)
        if not (isinstance(stop_token_ids, str) and stop_token_ids == "auto"):
            self._check_stop_token_ids(stop_token_ids)
        return super().generate(inputs, max_length, stop_token_ids, strip_prompt)

    def make_generate_function(self):
        """The function that continues texts, compiled unless the model is to `run_eagerly`.

        Threads take turns.
        """
        with TURN:
            return self._make_generate_function()

    def _make_generate_function(self):
        if self.generate_function is None:
            # On a CPU Keras leaves TensorFlow's XLA out, which runs this loop three times as fast.
            before, self.jit_compile = self.jit_compile, not self.run_eagerly
            generate_step = super().make_generate_function()
            self.jit_compile = before

            def generate(inputs, stop_token_ids=None):
                stop_token_ids = self._check_stop_token_ids(stop_token_ids)
                self._check_sampler()
                inputs = add_prompt(inputs, self.backbone.vocabulary_size)
                with TURN:
                    return generate_step(inputs, stop_token_ids or None)

            self.generate_function = generate
        return self.generate_function

    def generate_step(self, inputs, stop_token_ids=None):
        """Continues a batch of prompts; `generate` compiles it.

        Args:
            inputs: dict of `"token_ids"` (B, T) and `"padding_mask"` (B, T), prompts at the left,
                and optionally `"prompt"`, the first columns of `"token_ids"`, which hold them all.
            stop_token_ids: tuple of ints, or `None`. A row is finished after any of them.

        Returns:
            Dict of `"token_ids"` and `"padding_mask"`, (B, T).
        """
        token_ids = ops.cast(inputs["token_ids"], "int32")
        padding_mask = ops.cast(inputs["padding_mask"], "bool")
        prompt = ops.cast(inputs.get("prompt", token_ids), "int32")
        B, P = ops.shape(prompt)
        lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=1)
        rows = Alignment(lengths, P, ops.shape(token_ids)[1])

        # The first `next` reads the last token of the prompts, so the cache must not have it.
        columns = ops.arange(P, dtype="int32")[None]
        read, step = repeated(self._advance, self), repeated(self.call_with_cache, self)
        hidden_states, cache = read(prompt, None, columns < rows.last)
        last_token = ops.take_along_axis(prompt, rows.last, axis=1)
        _, last_hidden, _ = step(last_token, cache)
        is_last = (columns == rows.last)[..., None]
        hidden_states = ops.where(is_last, last_hidden, hidden_states)

        def is_finished(stopped, index):
            """Whether a row is full or stopped in all its beams; the same for each of these."""
            beams = ops.shape(stopped)[0] // B
            stopped = ops.all(ops.reshape(stopped, (B, beams)), axis=1)
            finished = ops.logical_or(index - rows.start >= rows.budget, stopped)
            return ops.repeat(finished, beams, axis=0)[:, None]

        # A finished row takes this token with certainty: nothing that it still goes through while
        # others are at work changes the score of its beams. One row alone ends the loop.
        filler = 0 if stop_token_ids is None else stop_token_ids[0]
        is_filler = ops.arange(self.backbone.vocabulary_size)[None] == filler
        certain = ops.where(is_filler, 0.0, -1e9)

        def next(prompt, cache, index):
            token = prompt[:, index - 1][:, None]
            states, stopped = cache
            logits, hidden_states, states = step(token, states)
            logits, hidden_states = logits[:, 0], hidden_states[:, 0]
            if B != 1:
                if stop_token_ids is not None:
                    is_stop = ops.logical_and(is_any(token, stop_token_ids), index > rows.start)
                    stopped = ops.logical_or(stopped, is_stop)
                logits = ops.where(is_finished(stopped, index), certain, logits)
            return logits, hidden_states, (states, stopped)

        buffer = self.sampler(
            next=next,
            prompt=ops.where(rows.is_prompt, rows.right(prompt), EMPTY),
            cache=(cache, ops.zeros((B, 1), "bool")),
            index=rows.start,
            mask=rows.is_prompt,
            stop_token_ids=stop_token_ids,
            hidden_states=rows.right(hidden_states),
            model=self,
        )
        generated = rows.left(buffer)
        if stop_token_ids is None:
            is_output = ops.ones_like(padding_mask)
        else:
            new = ops.logical_not(padding_mask)
            stops = ops.cast(ops.logical_and(is_any(generated, stop_token_ids), new), "int32")
            is_output = ops.cumsum(stops, axis=1) - stops == 0  # up to the first one, included
        return {
            "token_ids": ops.where(is_output, generated, token_ids),
            "padding_mask": is_output,
        }

    def _advance(self, token_ids, cache, padding_mask=None):
        """Hidden states of tokens that come after those in `cache`, and the next cache."""
        if cache is not None and not isinstance(cache, (list, tuple)):
            raise ValueError(
                "`cache` must be what the call before returned, or None to start afresh. "
                f"Received: {repr(cache)}."
            )
        mask = None if padding_mask is None else as_tensor("padding_mask", padding_mask, "flag")
        x = self.backbone.token_embedding(token_ids)
        return self.backbone.stack(x, initial_state=cache, mask=mask, return_state=True)

    def _logits(self, hidden_states):
        return self.soft_cap(self.backbone.token_embedding(hidden_states, reverse=True))

    def _check_ids(self, **named):
        ((name, ids),) = named.items()
        return check_ids(name, ids, self.backbone.vocabulary_size)

    def _check_data(self, x):
        """Checks what `fit` and its like are given, as far as it is no data set or tensor."""
        if self.preprocessor is not None:
            return check_texts("x", x)
        if x is None or isinstance(x, (dict, str, list, tuple, np.ndarray, Number)):
            check_inputs("x", x, self.backbone.vocabulary_size)

    def _check_targets(self, x, y):
        """The same of the targets, as far as they go into this model's own loss."""
        if isinstance(x, dict) and isinstance(self.loss, TokenLoss):
            y = self._check_ids(y=y)
            check_shapes(token_ids=(self._check_ids(token_ids=x["token_ids"]), "B S"), y=(y, "B S"))

    def _check_sampler(self):
        if isinstance(self.sampler, SpeculativeSampler):
            raise ValueError(
                "`SpeculativeSampler` drops tokens of a draft model again, and a recurrent state "
                "cannot be rolled back. Compile with another sampler, such as 'greedy'."
            )
        if getattr(self.sampler, "return_all_beams", False):
            raise ValueError(
                "`generate()` returns one sequence a prompt. Received: a sampler with "
                "`return_all_beams=True`. Compile with `return_all_beams=False`."
            )

    def _check_stop_token_ids(self, ids):
        """`stop_token_ids` as a tuple."""
        size = self.backbone.vocabulary_size
        ids = () if ids is None else ids
        try:
            known = [is_int(id) and 0 <= id < size for id in ids]
        except TypeError:  # not iterable
            known = [False]
        if not all(known):
            raise ValueError(
                f"`stop_token_ids` must be a list of ids in the vocabulary, from 0 to {size - 1}, "
                f"or None for none. Received: stop_token_ids={repr(ids)}."
            )
        return tuple(int(id) for id in ids)


def _check_parts(backbone, preprocessor):
    if not isinstance(backbone, XLSTMBackbone):
        raise ValueError(
            f"`backbone` must be an `XLSTMBackbone`. Received: {type(backbone).__name__}."
        )
    if preprocessor is None:
        return
    if not isinstance(preprocessor, CausalLMPreprocessor):
        raise ValueError(
            "`preprocessor` must be an `XLSTMCausalLMPreprocessor`, or None for token ids. "
            f"Received: {type(preprocessor).__name__}."
        )
    tokenizer, size = preprocessor.tokenizer, backbone.vocabulary_size
    if getattr(tokenizer, "vocabulary", None) and tokenizer.vocabulary_size() > size:
        raise ValueError(
            "`preprocessor` must make no ids beyond the backbone's vocabulary. Received: a "
            f"tokenizer of {tokenizer.vocabulary_size()} tokens, vocabulary_size={size}. Pass "
            "`vocabulary_size=tokenizer.vocabulary_size()` to the backbone."
        )


class Step(keras.layers.Layer):
    """`call_with_cache` from one flat list to another. `layers` are those whose weights it uses."""

    def __init__(self, call_with_cache, layers, cache):
        super().__init__(autocast=False)
        self.call_with_cache, self.layers = call_with_cache, layers
        self.structure = tree.map_structure(lambda x: None, cache)

    def call(self, inputs):
        token_ids, *states = inputs
        cache = tree.pack_sequence_as(self.structure, states)
        logits, _, cache = self.call_with_cache(token_ids, cache)
        return [logits, *tree.flatten(cache)]
