"""Opens checkpoints of `transformers` where KerasHub opens presets."""

import functools
import os

from keras_hub.src.models import backbone, preprocessor, task
from keras_hub.src.tokenizers import tokenizer as hub_tokenizer
from keras_hub.src.utils import preset_utils
from keras_hub.src.utils.preset_utils import PresetLoader, get_file

from keras_xlstm.converters import large, tokenizer, transformers
from keras_xlstm.files import finish
from keras_xlstm.models.backbone import XLSTMBackbone

MODEL_TYPE = "xlstm"


class XLSTMPresetLoader(PresetLoader):
    """Reads a folder, local or of a hub, whose `config.json` has `model_type: xlstm`."""

    def check_backbone_class(self):
        return XLSTMBackbone

    def load_backbone(self, cls, load_weights, head=False, **kwargs):
        tensors = None
        if load_weights:
            tensors = transformers.open_tensors(functools.partial(get_file, self.preset))
        model = cls(**transformers.backbone_config(self.config, tensors) | kwargs)
        if load_weights:
            transformers.load_backbone(model, self.config, tensors, head=head)
        return model

    def load_task(self, cls, load_weights, load_task_weights, **kwargs):
        if "backbone" not in kwargs:
            backbone_kwargs, kwargs = self.get_backbone_kwargs(**kwargs)
            kwargs["backbone"] = self.load_backbone(
                cls.backbone_cls, load_weights, head=True, **backbone_kwargs
            )
        cap = large.logit_soft_cap(self.config, transformers.CONFIG_FILE)
        return super().load_task(
            cls, load_weights, load_task_weights, **{"logit_soft_cap": cap} | kwargs
        )

    def load_tokenizer(self, cls, config_file=None, **kwargs):
        try:
            path = get_file(self.preset, tokenizer.TOKENIZER_FILE)
        except FileNotFoundError as e:
            raise ValueError(
                f"'{self.preset}' has no {tokenizer.TOKENIZER_FILE}. To work with token ids, load "
                "the model with `preprocessor=None`."
            ) from e
        return cls(**tokenizer.tokenizer_config(path) | kwargs)


def register():
    """Lets KerasHub's `from_preset` find the loader.

    KerasHub chooses among its own converters by `model_type` and has no place to add one, so the
    function that chooses is wrapped, in each module that holds it by name.
    """
    known = preset_utils.get_preset_loader

    @functools.wraps(known)
    def get_preset_loader(preset):
        if os.path.isdir(preset):
            finish(preset)
        if preset_utils.check_file_exists(preset, transformers.CONFIG_FILE):
            try:
                config = preset_utils.load_json(preset, transformers.CONFIG_FILE)
            except ValueError as e:
                raise ValueError(
                    f"'{preset}': {transformers.CONFIG_FILE} must hold JSON ({e})."
                ) from e
            if isinstance(config, dict) and config.get("model_type") == MODEL_TYPE:
                return XLSTMPresetLoader(preset, config)
        return known(preset)

    for module in (preset_utils, backbone, preprocessor, task, hub_tokenizer):
        module.get_preset_loader = get_preset_loader
