"""Sampled answers during training: what the model writes for fixed prompts, and what the user's metric says of it.

From trlx's `evaluate` (CarperAI/trlx, accelerate_base_trainer.py): prompts with metadata for `metric_fn`, stop
sequences, and one generation setting given as a list, which is swept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from deft.core.errors import InputError, user_code
from deft.encoding import tokenizer as tokenizers
from deft.evaluation import generate as generation
from deft.evaluation.prompt_form import RAW, PromptForm
from deft.evaluation.prompts import Prompt

MetricFn: TypeAlias = Callable[..., Mapping[str, Sequence[float]]]
"""metric_fn(samples=[...], prompts=[...], outputs=[...], **metadata) -> {name: [one number per sample]}."""

NEW_TOKENS = 40
"""Length of a sampled answer where `generate` does not give `max_new_tokens` (trlx's default)."""

LISTS = {
    *("bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers", "eos_token_id"),
    *("exponential_decay_length_penalty", "force_words_ids", "forced_eos_token_id", "sequence_bias", "suppress_tokens"),
}
"""Settings for which transformers itself expects a list: never swept."""


@dataclass(frozen=True, slots=True)
class SampleSetting:
    """One value of a sweep: its name, as in "temperature=0.5", or "" where nothing is swept."""

    name: str
    generate: Mapping[str, Any]

    @property
    def suffix(self) -> str:
        return f"@{self.name}" if self.name else ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `prompt` is the text that the model was shown."""

    prompt: str
    output: str
    metrics: Mapping[str, float]
    setting: str


@dataclass(frozen=True, slots=True)
class Samples:
    """All answers, and means as {"metrics/<name>": mean}, with "@temperature=0.5" behind the name in a sweep."""

    rows: tuple[Sample, ...]
    means: Mapping[str, float]


def settings(generate: Mapping[str, Any]) -> tuple[SampleSetting, ...]:
    """The settings to sample with: one, or one per value where a setting that is a single value is given as a list.

    Raises InputError where two settings are lists, a list is empty, or `generate.resolve` refuses a setting.

    >>> [s.name for s in settings({"temperature": [0.5, 1.0]})]
    ['temperature=0.5', 'temperature=1.0']
    >>> settings({"eos_token_id": [1, 2]})[0].suffix
    ''
    """
    swept = [key for key, value in generate.items() if isinstance(value, list | tuple) and key not in LISTS]
    if len(swept) > 1:
        raise InputError(
            f"evaluate.generate: {' and '.join(swept)} are lists, but one setting can be swept; choose one"
        )
    if not swept:
        return (SampleSetting("", generation.resolve(generate, NEW_TOKENS)),)
    (key,) = swept
    values = generate[key]
    if not values:
        raise InputError(f"evaluate.generate.{key}: an empty list sweeps nothing; give values or leave it out")
    chosen = [generation.resolve({**generate, key: value}, NEW_TOKENS) for value in values]
    return tuple(SampleSetting(f"{key}={value}", each) for value, each in zip(values, chosen, strict=True))


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    generate: Mapping[str, Any],
    stop_sequences: Sequence[str] = (),
    metric_fn: MetricFn | None = None,
    form: PromptForm = RAW,
) -> Samples:
    """Answers to all prompts under each setting, and the metrics of each answer.

    form  how texts are put to the model

    Random numbers are drawn from a copy of torch's state, so that sampling does not change training. Raises
    UserCodeError where `metric_fn` raises, InputError where its result is not one number per sample and name.
    """
    if not prompts:
        return Samples((), {})
    held = tokenizers.wrap(tokenizer)
    shown = [form.shown(each.prompt) for each in prompts]
    texts = [generation.prompt_text(held, each, form.template_kwargs) for each in shown]
    rows: list[Sample] = []
    means: dict[str, float] = {}
    for setting in settings(generate):
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            outputs = generation.complete(
                model,
                held,
                shown,
                generate=setting.generate,
                stop_sequences=stop_sequences,
                template_kwargs=form.template_kwargs,
            )
        metrics = _measure(metric_fn, texts, outputs, prompts) if metric_fn else {}
        for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
            of_answer = {name: values[index] for name, values in metrics.items()}
            rows.append(Sample(text, output, of_answer, setting.name))
        means |= {f"metrics/{name}{setting.suffix}": sum(values) / len(values) for name, values in metrics.items()}
    return Samples(tuple(rows), means)


def _measure(
    metric_fn: MetricFn, texts: Sequence[str], outputs: Sequence[str], prompts: Sequence[Prompt]
) -> dict[str, list[float]]:
    """What metric_fn says, checked. Metadata that a prompt does not have is None in its place."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.metadata)
    metadata = {name: [prompt.metadata.get(name) for prompt in prompts] for name in names}
    samples = [text + output for text, output in zip(texts, outputs, strict=True)]
    with user_code("metric_fn"):
        result = metric_fn(samples=samples, prompts=list(texts), outputs=list(outputs), **metadata)
    if not isinstance(result, Mapping):
        raise InputError(f"metric_fn: returned {type(result).__name__}; it must return {{name: [a number per sample]}}")
    return {str(name): _numbers(str(name), values, len(samples)) for name, values in result.items()}


def _numbers(name: str, values: Any, count: int) -> list[float]:
    """One number per sample, from a list, array or tensor of any library and device."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        raise InputError(f"metric_fn: {name!r} is {type(values).__name__}; it must be a list of {count} numbers")
    if len(plain) != count:
        raise InputError(f"metric_fn: {name!r} has {len(plain)} values for {count} samples; give one per sample")
    numbers = [value.item() if hasattr(value, "item") else value for value in plain]
    for index, value in enumerate(numbers):
        if not isinstance(value, int | float):
            raise InputError(f"metric_fn: {name!r}[{index}] is {value!r}, not a number")
    return [float(value) for value in numbers]
