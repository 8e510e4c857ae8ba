"""Multimodal checkpoints: trained on text alone, all other parts frozen and saved back as they were."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
)
from transformers.utils import AUDIO_TOKENIZER_NAME, FEATURE_EXTRACTOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)

PROCESSOR_FILES = (
    FEATURE_EXTRACTOR_NAME,
    PROCESSOR_NAME,
    VIDEO_PROCESSOR_NAME,
    AUDIO_TOKENIZER_NAME,
    "chat_template.json",
)
"""What turns images, videos and sound into inputs. Training on text leaves it as it is."""


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that makes the model which was saved with `config`, all its parts; None where there is none.

    Some configs stand for two models. The plain one would lose the other parts (Qwen3.5), so `architectures` decides.

    >>> from transformers import GPT2Config, LlavaConfig
    >>> auto_class(GPT2Config()).__name__, auto_class(LlavaConfig()).__name__
    ('AutoModelForCausalLM', 'AutoModelForImageTextToText')
    """
    able = [auto for auto in AUTO_CLASSES if type(config) in auto._model_mapping]
    if len(able) < 2:
        return able[0] if able else None
    saved = set(config.architectures or ())
    named = (auto for auto in able if auto._model_mapping[type(config)].__name__ in saved)
    return next(named, able[0])


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether language is one part among others.

    >>> from transformers import Gemma3Config, Gemma3TextConfig
    >>> is_multimodal(Gemma3Config()), is_multimodal(Gemma3TextConfig())
    (True, False)
    """
    return config.get_text_config() is not config


def text_body(model: PreTrainedModel) -> Any:
    """What turns token ids into the hidden states that the head is applied to."""
    return model.get_decoder() if is_multimodal(model.config) else model.base_model


def freeze_all_but_text(model: PreTrainedModel) -> None:
    """Leaves a gradient to the language model and its embeddings alone, where a model is multimodal."""
    if not is_multimodal(model.config):
        return
    model.requires_grad_(False)
    for part in (text_body(model), model.get_input_embeddings(), model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(True)
