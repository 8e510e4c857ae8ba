"""The whole configuration: its files and overrides; every problem named at once with the closest right name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from deft.core.config import Section
from deft.core.errors import InputError, Problem, Problems
from deft.core.registry import closest
from deft.dataset.config import DataConfig
from deft.encoding.raw import Side
from deft.encoding.render.chat import Reasoning
from deft.encoding.rows import Overflow
from deft.evaluation.config import EvaluateConfig
from deft.model.config import AdapterConfig, FreezeConfig, of_folder
from deft.plan.config import BatchConfig, ScheduleConfig
from deft.run.other_names import OTHER_NAMES
from deft.training.config import CheckpointConfig, LossConfig, OptimizerConfig

ADAPTER_LR = 2e-4
"""The learning rate of adapters: ten times and more that of full fine-tuning, as LoRA's papers and users have it."""


class Config(Section):
    """Everything a run needs to be told; two keys have no default.

    skip_bad_steps  how many steps whose loss or gradient is not finite are skipped; the next one stops the run
    """

    model: str
    data: DataConfig
    template: str = "auto"
    template_kwargs: dict[str, Any] = Field({})
    reasoning: Reasoning = "auto"
    output: str | None = None
    max_length: int | None = Field(None, ge=2)
    overflow: Overflow = "turns"
    truncation_side: Side = "right"
    batch: BatchConfig = BatchConfig(examples=32)
    microbatch_tokens: Literal["auto"] | int = "auto"
    epochs: int = Field(3, ge=1)
    steps: int | None = Field(None, ge=1)
    skip_bad_steps: int = Field(0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    adapter: AdapterConfig | None = None
    freeze: FreezeConfig = FreezeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: str = Field("auto", pattern=r"^(auto|never|step-\d+)$")
    dropout: Literal["off", "config"] = "off"
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adapters(cls, values: Any) -> Any:
        """Adapters are trained at a rate of their own unless it is said."""
        if not isinstance(values, Mapping) or not values.get("adapter"):
            return values
        optimizer = values.get("optimizer", {})
        return {**values, "optimizer": {"lr": ADAPTER_LR, **optimizer}} if isinstance(optimizer, Mapping) else values

    @field_validator("adapter", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

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
    """A nested mapping -> the configuration; every problem in one error.

    A model that is the folder of an adapter stands for its base, and the adapter to go on from.
    """
    try:
        return Config.model_validate(_with_base(values))
    except ValidationError as error:
        raise Problems(
            f"{where}: the configuration is not valid", [_problem(each) for each in error.errors()]
        ) from error


def _with_base(values: Mapping[str, Any]) -> Mapping[str, Any]:
    model = values.get("model")
    folder = Path(str(model)).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").exists()
    if model is None or not is_adapter:
        return values
    if values.get("adapter"):
        fix = "leave adapter out to go on with it; for a new one name a model it is merged into, as a run's final/"
        raise InputError(f"model: {folder} is an adapter itself; {fix}")
    base, settings = of_folder(folder)
    return {**values, "model": base, "adapter": settings}


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
    if not isinstance(inner, Mapping):
        inner = {_ALONE[head]: inner} if head in _ALONE and inner is not None else {}
    return {**values, head: _with(inner, rest, value)}


_ALONE = {"data": "train", "adapter": "name"}
"""What a value alone says of a group of keys."""


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
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += keys(kind, f"{prefix}{name}.")
    return found


def _closest_value(error: Mapping[str, Any]) -> str:
    if error["type"] != "literal_error":
        return ""
    choices = [word.strip(" '") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
    return closest(str(error["input"]), choices)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
