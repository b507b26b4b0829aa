import threading

import keras
from keras import ops
from keras_hub.models import Backbone

from keras_xlstm.converters import transformers
from keras_xlstm.files import saving, saving_file
from keras_xlstm.layers import XLSTMBlockStack
from keras_xlstm.layers.block_stack import check_slstm_at
from keras_xlstm.layers.composite import Composite
from keras_xlstm.layers.dense import TokenEmbedding
from keras_xlstm.models.distribution import layout_map
from keras_xlstm.ops import segment_starts
from keras_xlstm.ops.checks import check_cap, check_positive, check_positive_int, given, repr

# Threads take turns: on JAX `predict` takes the numbers out of the variables while it runs, and
# what torch traces for one model catches the layers that another thread calls, of any model.
TURN = threading.RLock()


@keras.saving.register_keras_serializable("keras_xlstm")
class XLSTMBackbone(Composite, Backbone):
    """The xLSTM from token ids to hidden states: an embedding and a stack of blocks.

    Inputs are `{"token_ids", "padding_mask"}`, both (B, S). A padded position changes nothing
    behind it, wherever it stands. With `packed=True` there is a third, `"segment_ids"`: where it
    changes, the state is cleared, so that the documents of one row do not see each other.

    Args:
        vocabulary_size: int, number of tokens.
        num_layers: int, number of blocks.
        hidden_dim: int, width of the residual stream.
        num_heads: int, heads in each block.
        qk_dim_factor: float, all queries together are `hidden_dim * qk_dim_factor` wide.
        v_dim_factor: float, the same for values.
        ffn_dim_factor: float, hidden width of the feed-forward layers over `hidden_dim`.
        ffn_round_up_to: int, that width is rounded down to a whole number and then up to a
            multiple of it.
        gate_soft_cap: float, soft cap of the gate pre-activations.
        norm_epsilon: float, epsilon of the norms.
        denominator_epsilon: float, `eps` of `keras_xlstm.ops.mlstm`.
        slstm_at: list of ints, the blocks that hold an sLSTM; the others hold an mLSTM.
        block_style: `"large"`, the blocks of the 7B model, or `"original"`, those of the 2024
            paper, in which the factors, the soft cap and the denominator's epsilon have no
            meaning.
        mlstm_block, slstm_block: dicts of further arguments of the original blocks, as in
            `keras_xlstm.layers.XLSTMBlockStack`.
        tie_embeddings: bool, whether the head of a language model reuses the embedding.
        chunk_size: int, steps a chunk in the mLSTM. `None` lets the kernel choose.
        packed: bool, whether rows hold several documents, as `keras_xlstm.utils.pack` makes them.
            It changes no weight: `from_preset(preset, packed=True)` opens any model that way.
        dtype: string or `keras.DTypePolicy`.

    A call does not look at token ids: one outside the vocabulary is an error of the framework or
    gives NaN, as in `keras.layers.Embedding`. A language model's `fit`, `evaluate`, `predict`,
    `score` and `generate` do look at those that come as arrays or lists.

    Example:

    ```python
    backbone = XLSTMBackbone(vocabulary_size=258, num_layers=2, hidden_dim=64, num_heads=4)
    backbone({"token_ids": [[5, 6, 7]], "padding_mask": [[1, 1, 1]]})  # (1, 3, 64)
    ```
    """

    is_recomputed_in_parts = True

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        hidden_dim,
        num_heads,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        ffn_dim_factor=2.667,
        ffn_round_up_to=64,
        gate_soft_cap=15.0,
        norm_epsilon=1e-6,
        denominator_epsilon=1e-6,
        slstm_at=(),
        block_style="large",
        mlstm_block=None,
        slstm_block=None,
        tie_embeddings=False,
        chunk_size=None,
        packed=False,
        dtype=None,
        **kwargs,
    ):
        check_positive_int(
            vocabulary_size=vocabulary_size,
            num_layers=num_layers,
            hidden_dim=hidden_dim,
            num_heads=num_heads,
            ffn_round_up_to=ffn_round_up_to,
            **given(chunk_size=chunk_size),
        )
        check_positive(
            qk_dim_factor=qk_dim_factor,
            v_dim_factor=v_dim_factor,
            ffn_dim_factor=ffn_dim_factor,
            norm_epsilon=norm_epsilon,
            denominator_epsilon=denominator_epsilon,
        )
        check_cap(gate_soft_cap=gate_soft_cap)
        check_keywords(type(self), kwargs)
        slstm_at = check_slstm_at(slstm_at, num_layers)
        if block_style == "large":
            _check_head_width("qk_dim_factor", qk_dim_factor, hidden_dim, num_heads)
            _check_head_width("v_dim_factor", v_dim_factor, hidden_dim, num_heads)

        # === Layers ===
        self.token_embedding = TokenEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_embeddings,
            embeddings_initializer=keras.initializers.RandomNormal(
                stddev=(2 / (5 * hidden_dim)) ** 0.5
            ),
            dtype=dtype,
            name="token_embedding",
        )
        # Hidden states come with a mask when they are turned into logits, and it ends there.
        self.token_embedding.supports_masking = True
        self.stack = XLSTMBlockStack(
            num_layers,
            num_heads=num_heads,
            slstm_at=slstm_at,
            block_style=block_style,
            mlstm_block=mlstm_block,
            slstm_block=slstm_block,
            chunk_size=chunk_size,
            qk_dim_factor=qk_dim_factor,
            v_dim_factor=v_dim_factor,
            ffn_dim_factor=ffn_dim_factor,
            ffn_round_up_to=ffn_round_up_to,
            gate_soft_cap=gate_soft_cap,
            norm_epsilon=norm_epsilon,
            denominator_epsilon=denominator_epsilon,
            dtype=dtype,
            name="stack",
        )

        # === Functional Model ===
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask", "segment_ids")[: 3 if packed else 2]
        }
        x = self.token_embedding(inputs["token_ids"])
        mask = ops.cast(inputs["padding_mask"], "bool")
        reset = segment_starts(inputs["segment_ids"]) if packed else None
        outputs = self.stack(x, mask=mask, reset=reset)
        super().__init__(inputs=inputs, outputs=outputs, dtype=dtype, **kwargs)

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.qk_dim_factor = qk_dim_factor
        self.v_dim_factor = v_dim_factor
        self.ffn_dim_factor = ffn_dim_factor
        self.ffn_round_up_to = ffn_round_up_to
        self.gate_soft_cap = gate_soft_cap
        self.norm_epsilon = norm_epsilon
        self.denominator_epsilon = denominator_epsilon
        self.slstm_at = slstm_at
        self.block_style = block_style
        self.mlstm_block = self.stack.mlstm_block
        self.slstm_block = self.stack.slstm_block
        self.tie_embeddings = tie_embeddings
        self.chunk_size = chunk_size
        self.packed = packed

    @staticmethod
    def get_layout_map(
        device_mesh, model_parallel_dim_name="model", data_parallel_dim_name="batch"
    ):
        """How `keras.distribution.ModelParallel` lays out the weights, on JAX.

        Heads, feed-forward layers and the vocabulary are split over the model axis, so that each
        device computes its own heads from their queries to their outputs: that axis must divide
        `num_heads`, the width of the feed-forward layers and the vocabulary. The data axis splits
        the batch only.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: string, the axis of the mesh to split weights over.
            data_parallel_dim_name: string, the axis of the mesh that splits the batch.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if `device_mesh` is no `DeviceMesh` with these axes.

        Example:

        ```python
        devices = keras.distribution.list_devices()
        mesh = keras.distribution.DeviceMesh((1, len(devices)), ("batch", "model"), devices)
        layout_map = XLSTMBackbone.get_layout_map(mesh)
        with keras.distribution.ModelParallel(layout_map=layout_map).scope():
            backbone = XLSTMBackbone(256, num_layers=2, hidden_dim=64, num_heads=len(devices))
        ```
        """
        return layout_map(device_mesh, model_parallel_dim_name, data_parallel_dim_name)

    def save_to_preset(self, preset_dir, **kwargs):
        """As in KerasHub, but all or nothing: an interrupted save leaves what stood there."""
        with saving(preset_dir, self.variables) as folder:
            super().save_to_preset(folder, **kwargs)

    def predict(self, *args, **kwargs):
        """As in Keras. Threads take turns."""
        with TURN:
            return super().predict(*args, **kwargs)

    def predict_on_batch(self, x):
        """As in Keras. Threads take turns."""
        with TURN:
            return super().predict_on_batch(x)

    def load_weights(self, filepath, *args, **kwargs):
        """As in Keras, with errors that name the file."""
        try:
            super().load_weights(filepath, *args, **kwargs)
        except OSError as e:
            raise OSError(e.errno, f"'{filepath}' cannot be read: {e}. Copy it again") from e
        except (KeyError, RuntimeError, TypeError, ValueError) as e:
            raise ValueError(
                f"'{filepath}' must hold the weights of this very model, whole. Received: {e!r}. "
                "Copy it again, or open the model that it belongs to by `from_preset`."
            ) from e

    def save_lora_weights(self, filepath):
        """As in KerasHub, but all or nothing."""
        with saving_file(filepath, self.trainable_variables) as path:
            super().save_lora_weights(path)

    def export_to_transformers(self, path, **kwargs):
        """Writes a folder that `transformers.AutoModelForCausalLM` opens.

        Args:
            path: str, the folder.
            **kwargs: see `XLSTMCausalLM.export_to_transformers`.
        """
        transformers.save(self, path, **kwargs)

    def enable_lora(self, rank, target_layer_names=None):
        """Freezes the weights, and gives dense layers adapters that are trained in their place.

        Args:
            rank: int, of the adapters.
            target_layer_names: list of strings, names of layers. `None` for
                `default_lora_layer_names()`.

        Raises:
            ValueError: if there is no such layer.
        """
        check_positive_int(rank=rank)
        names = sorted({x.name for x in self._flatten_layers() if hasattr(x, "enable_lora")})
        wanted = names if target_layer_names is None else target_layer_names
        if not isinstance(wanted, (list, tuple)) or not wanted or not set(wanted) <= set(names):
            raise ValueError(
                f"`target_layer_names` must be a list of names among {names}. "
                f"Received: target_layer_names={repr(target_layer_names)}."
            )
        super().enable_lora(rank, target_layer_names)

    def default_lora_layer_names(self):
        """The dense layers around the memories, as far as this model has them."""
        wanted = ["query", "key", "value", "output_gate", "output", "projection"]
        if self.block_style == "original":  # here those mix but a few features each
            wanted = ["up", "down"]
        names = {layer.name for layer in self._flatten_layers() if hasattr(layer, "enable_lora")}
        return [name for name in wanted if name in names]

    def get_config(self):
        return super().get_config() | {
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "qk_dim_factor": self.qk_dim_factor,
            "v_dim_factor": self.v_dim_factor,
            "ffn_dim_factor": self.ffn_dim_factor,
            "ffn_round_up_to": self.ffn_round_up_to,
            "gate_soft_cap": self.gate_soft_cap,
            "norm_epsilon": self.norm_epsilon,
            "denominator_epsilon": self.denominator_epsilon,
            "slstm_at": list(self.slstm_at),
            "block_style": self.block_style,
            "mlstm_block": dict(self.mlstm_block),
            "slstm_block": dict(self.slstm_block),
            "tie_embeddings": self.tie_embeddings,
            "chunk_size": self.chunk_size,
            "packed": self.packed,
        }


def check_keywords(cls, kwargs, known=("name", "trainable")):
    """Refuses what Keras' functional models would silently leave out: a misspelt argument."""
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"`{cls.__name__}` has no such arguments. Received: {', '.join(unknown)}. "
            f"See `help({cls.__name__})`."
        )


def _check_head_width(name, factor, hidden_dim, num_heads):
    width = int(hidden_dim * factor)  # a fraction is cut off, as in the 7B model
    head_dim = width / num_heads
    if width == 0 or width % num_heads:
        raise ValueError(
            f"`int(hidden_dim * {name}) / num_heads`, the width of a head, must be a whole number. "
            f"Received: int({hidden_dim} * {factor}) / {num_heads} = {head_dim}. The nearest fit: "
            f"{name}={max(round(head_dim), 1) * num_heads / hidden_dim}."
        )
