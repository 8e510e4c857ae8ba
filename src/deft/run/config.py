"""The configuration: small frozen models, one file or call, every problem named at once with the closest right name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deft.core.errors import InputError, Problem, Problems
from deft.core.registry import closest
from deft.data.choices import Answers, Control
from deft.data.fields import LARGEST_WEIGHT
from deft.encoding.raw import Side
from deft.encoding.render.chat import Reasoning
from deft.encoding.rows import Overflow, Render, TrainOn
from deft.plan.schedule import Name as ScheduleName


class Section(BaseModel):
    """What all models share: frozen, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Section):
    """Rows: a file, a folder, a glob, - or a Hub id; `format` is found by looking unless it is named.

    columns      what a format calls a field -> what the rows call it: {prompt: question, completion: answer}
    answers      of several to one prompt: the best, or all good ones; each format has its default
    control      HALOs' control tokens: text before good and bad answers
    subset       of a Hub data set; split: of a Hub data set or HALOs file, train (test for data.eval) by default
    times        how often its rows are learnt in an epoch; a share of them, drawn by seed, where it is not whole
    loss_weight  multiplies the weight of every token
    max_rows     reads no further
    """

    path: str
    format: str = "auto"
    columns: dict[str, str] = {}
    answers: Answers | None = None
    control: Control | None = None
    subset: str | None = None
    split: str | None = None
    times: float = Field(1.0, gt=0, le=1000)
    loss_weight: float = Field(1.0, gt=0, le=LARGEST_WEIGHT)
    max_rows: int | None = Field(None, ge=1)


class Data(Section):
    """The rows. `eval` is a share of the training rows by content hash, or sources of its own."""

    train: tuple[Source, ...]
    eval: float | tuple[Source, ...] = 0.0
    train_on: TrainOn | None = None
    learn_reasoning: bool = True
    learn_tool_calls: bool = True
    render: Render = "auto"
    allow_refused: int = Field(0, ge=0)

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return _as_sources(value)

    @field_validator("eval", mode="before")
    @classmethod
    def _share_or_sources(cls, value: Any) -> Any:
        try:
            return float(value)
        except (TypeError, ValueError):
            return _as_sources(value)

    @field_validator("eval")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 <= value < 1:
            raise ValueError("a share is at least 0 and below 1")
        return value


class Batch(Section):
    """One optimizer step: a number of examples, or as many as fit in a number of tokens."""

    examples: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Batch:
        if (self.examples is None) == (self.tokens is None):
            raise ValueError("name examples or tokens, one of the two")
        return self


class Optimizer(Section):
    name: str = "adamw"
    lr: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: float | None = Field(1.0, gt=0)


class Schedule(Section):
    """warmup: a share below 1, steps from 1 on. decay: the falling share of wsd."""

    name: ScheduleName = "cosine"
    warmup: float = Field(0.03, ge=0)
    decay: float = Field(0.2, gt=0, le=1)


class Loss(Section):
    name: str = "nll"
    normalize: Literal["tokens", "examples"] = "tokens"


class Evaluate(Section):
    """Every `every` steps and at the end: held-out loss, and answers to `prompts`, a list or the name of a file."""

    every: int | None = Field(None, ge=1)
    prompts: str | tuple[Any, ...] = ()
    generate: dict[str, Any] = {}
    stop_sequences: tuple[str, ...] = ()

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        if not isinstance(value, str | Path | list | tuple | None):
            raise ValueError("name a file, or give a list of prompts")
        return str(value) if isinstance(value, Path) else value or ()


class CheckpointPolicy(Section):
    """Every `every` steps and at the end, null for never. What stays: the last `keep`, the best `keep_best` by held-out
    loss, and each of every `keep_every` steps."""

    every: int | None = Field(500, ge=1)
    keep: int = Field(2, ge=1)
    keep_best: int = Field(0, ge=0)
    keep_every: int | None = Field(None, ge=1)


class Config(Section):
    """Everything a run needs to be told; two keys have no default.

    skip_bad_steps  how many steps whose loss or gradient is not finite are skipped; the next one stops the run
    """

    model: str
    data: Data
    template: str = "auto"
    template_kwargs: dict[str, Any] = {}
    reasoning: Reasoning = "auto"
    output: str | None = None
    max_length: int | None = Field(None, ge=2)
    overflow: Overflow = "turns"
    truncation_side: Side = "right"
    batch: Batch = Batch(examples=32)
    microbatch_tokens: Literal["auto"] | int = "auto"
    epochs: int = Field(3, ge=1)
    steps: int | None = Field(None, ge=1)
    skip_bad_steps: int = Field(0, ge=0)
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    loss: Loss = Loss()
    evaluate: Evaluate = Evaluate()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    resume: str = Field("auto", pattern=r"^(auto|never|step-\d+)$")
    dropout: Literal["off", "config"] = "off"
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**63)

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | BaseModel) else {"train": value}

    @field_validator("microbatch_tokens")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least 1, or auto")
        return value


OTHER_NAMES = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim": "optimizer.name",
    "max_grad_norm": "optimizer.clip",
    "gradient_clipping": "optimizer.clip",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "warmup_ratio": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch.examples",
    "train_batch_size": "batch.examples",
    "micro_batch_size": "microbatch_tokens",
    "gradient_accumulation_steps": "batch.examples (one optimizer step; deft accumulates by itself)",
    "batch_size": "batch.examples",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "seq_length": "max_length",
    "cutoff_len": "max_length",
    "block_size": "max_length",
    "model_name_or_path": "model",
    "base_model": "model",
    "model_path": "model",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "val_set_size": "data.eval",
    "train_on_inputs": "data.train_on",
    "train_on_prompt": "data.train_on",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on",
    "chat_template": "template",
    "chat_template_kwargs": "template_kwargs",
    "output_dir": "output",
    "eval_steps": "evaluate.every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "load_best_model_at_end": "checkpoint.keep_best",
    "resume_from_checkpoint": "resume",
    "eval_prompts": "evaluate.prompts",
    "bf16": "precision",
    "fp16": "precision",
    "use_cpu": "device",
    "packing": "microbatch_tokens (deft always packs, without changing the result)",
    "sample_packing": "microbatch_tokens (deft always packs, without changing the result)",
}
"""What other trainers call a key -> what it is called here."""


def load(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """A YAML or TOML file and `key=value` overrides -> the configuration. Raises InputError or Problems."""
    values = _read(path) if path else {}
    for override in overrides:
        values = _with(values, *setting(override))
    return make(values, path or "the command line")


def setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value as YAML reads it; text that is no YAML is text. Raises InputError without "=".

    >>> setting("optimizer.lr=0.001"), setting("output=a: b: c")
    (('optimizer.lr', 0.001), ('output', 'a: b: c'))
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r}: neither a file nor key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        return key.strip(), value


def make(values: Mapping[str, Any], where: str = "deft.train") -> Config:
    """A nested mapping -> the configuration; every problem in one error."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise Problems(
            f"{where}: the configuration is not valid", [_problem(each) for each in error.errors()]
        ) from error


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with double underscores -> nested mappings.

    >>> nested({"optimizer__lr": 1e-5, "epochs": 2})
    {'optimizer': {'lr': 1e-05}, 'epochs': 2}
    """
    values: dict[str, Any] = {}
    for key, value in flat.items():
        values = _with(values, key.replace("__", "."), value)
    return values


def as_yaml(config: Config) -> str:
    """The configuration as a YAML file that gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: str) -> dict[str, Any]:
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = _parse(text, file.suffix)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML or TOML file, or give key=value") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a configuration; it needs at least the keys model and data")
    return values


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        import tomllib

        return tomllib.loads(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def _with(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    if not dot:
        return {**values, head: value}
    inner = values.get(head, {})
    inner = inner if isinstance(inner, Mapping) else {"train": inner} if head == "data" else {}
    return {**values, head: _with(inner, rest, value)}


def _as_sources(value: Any) -> Any:
    """One path, a list of paths, or source objects -> source objects."""
    entries = [value] if isinstance(value, str | Path | Mapping | Source) else value
    if not isinstance(entries, Sequence) or not entries:
        raise ValueError("name a file, or a list of files")
    return tuple({"path": str(entry)} if isinstance(entry, str | Path) else entry for entry in entries)


def _problem(error: Mapping[str, Any]) -> Problem:
    location = [str(part) for part in error["loc"] if not _is_union_branch(str(part))]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return Problem(key, "unknown key", _suggestion(key))
    if error["type"] == "missing":
        return Problem(key, "missing", f"give {key}=...")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return Problem(key, f"{message}, not {_shown(error['input'])}", _closest_value(error))


def _is_union_branch(part: str) -> bool:
    return part in ("float", "int", "literal['auto']") or part.startswith("tuple[")


def _suggestion(key: str) -> str:
    last = key.rpartition(".")[2]
    if last in OTHER_NAMES:
        return f"deft calls it {OTHER_NAMES[last]}"
    ends = {name.rpartition(".")[2]: name for name in reversed(keys())}
    return closest(key, keys()) or closest(last, ends, ends) or f"the keys are {', '.join(Config.model_fields)}"


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All keys with their dots.

    >>> "optimizer.lr" in keys()
    True
    """
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
    return found


def _closest_value(error: Mapping[str, Any]) -> str:
    if error["type"] != "literal_error":
        return ""
    choices = [word.strip(" '") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
    return closest(str(error["input"]), choices)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
