"""The whole configuration: its files and overrides; every problem named at once with the closest right name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from deft.core.config import SWITCHES, OrOff, PathText, Section, kinds_of
from deft.core.errors import InputError, Problem, Problems
from deft.core.registry import closest
from deft.dataset.config import DataConfig, SourceConfig
from deft.encoding.raw import Side
from deft.encoding.render.chat import Reasoning
from deft.encoding.rows import Overflow
from deft.evaluation.config import EvaluateConfig
from deft.export.config import ExportConfig
from deft.model.config import AdapterConfig, FreezeConfig, Quantize, base_of, is_adapter, of_folder
from deft.plan.config import BatchConfig, ScheduleConfig
from deft.run.other_names import NO_KEY, OTHER_NAMES, OTHER_VALUES, TAKES
from deft.training.config import CheckpointConfig, LossConfig, OptimizerConfig

ADAPTER_LR = {"prompt": 3e-2, "prefix": 1e-2}
"""The learning rate of virtual tokens, as peft's examples have it."""
LOW_RANK_LR = 2e-4
"""That of other adapters: ten times and more that of full fine-tuning, as LoRA's papers and users have it."""
LISTS = ("data", "data.train", "data.eval", "evaluate.prompts", "evaluate.stop_sequences")
"""Keys that may have several values."""


class Config(Section):
    """Everything a run needs to be told; two keys have no default.

    merge           an adapter in peft's form that is added to the model's weights before anything else
    quantize        the frozen base's linear layers under an adapter: nf4, as QLoRA has it, or int8
    lanes           micro-batches of a step come in multiples of it; auto is the number of ranks that begin the run
    shard           over how many ranks one copy of the model is spread, which share its memory: 1 has it whole on each,
                    all ranks are FSDP, and some of them HSDP; auto is the ranks of a machine, if the run allows it
    sums            of gradients of a sharded model: ordered has the bits of one rank, native is the backend's own way,
                    and auto that on CUDA
    reasoning       where the prompt opens a block of it: auto, empty or require (README, Which text a row becomes)
    neftune         alpha of the noise on the embeddings of what is trained on, such as 5
    skip_bad_steps  how many steps whose loss or gradient is not finite are skipped; the next one stops the run
    """

    model: PathText
    data: DataConfig
    template: PathText = "auto"
    template_kwargs: dict[str, Any] = Field({})
    reasoning: Reasoning = "auto"
    output: PathText | None = None
    max_length: int | None = Field(None, ge=2)
    overflow: Overflow = "turns"
    truncation_side: Side = "right"
    batch: BatchConfig = BatchConfig(examples=32)
    microbatch_tokens: Literal["auto"] | int = "auto"
    lanes: Literal["auto"] | int = "auto"
    shard: Literal["auto"] | int = "auto"
    sums: Literal["auto", "ordered", "native"] = "auto"
    epochs: int = Field(3, ge=1)
    steps: int | None = Field(None, ge=1)
    skip_bad_steps: int = Field(0, ge=0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    merge: PathText | None = None
    adapter: AdapterConfig | None = None
    quantize: Quantize = "off"
    freeze: FreezeConfig = FreezeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    resume: str = Field("auto", pattern=r"^(auto|never|step-\d+)$")
    dropout: Literal["off", "config"] = "off"
    neftune: Annotated[float | None, Field(gt=0), OrOff] = None
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="before")
    @classmethod
    def _rate_of_adapters(cls, values: Any) -> Any:
        """Adapters are trained at a rate of their own unless it is said."""
        if not isinstance(values, Mapping) or not values.get("adapter"):
            return values
        optimizer, adapter = _named(values.get("optimizer", {})), values["adapter"]
        name = adapter.get("name") if isinstance(adapter, Mapping) else getattr(adapter, "name", adapter)
        rate = ADAPTER_LR.get(str(name), LOW_RANK_LR)
        return {**values, "optimizer": {"lr": rate, **optimizer}} if isinstance(optimizer, Mapping) else values

    @field_validator("adapter", "optimizer", "loss", "schedule", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return _named(value)

    @field_validator("quantize")
    @classmethod
    def _under_an_adapter(cls, value: Quantize, info: ValidationInfo) -> Quantize:
        if value != "off" and info.data.get("adapter", True) is None:
            raise ValueError(
                "what is quantised cannot be trained itself: give adapter=lora as well, or leave quantize out"
            )
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return value if isinstance(value, Mapping | BaseModel) else {"train": value}

    @field_validator("resume", mode="before")
    @classmethod
    def _whether(cls, value: Any) -> Any:
        return {True: "auto", False: "never"}.get(SWITCHES.get(str(value).lower(), value), value)

    @field_validator("microbatch_tokens", "lanes", "shard")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if isinstance(value, int) and value < 1:
            raise ValueError("at least 1, or auto")
        return value


def load(path: str | None, overrides: Sequence[str] = (), say: Callable[[str], None] = lambda line: None) -> Config:
    """A YAML or TOML file and `key=value` overrides -> the configuration. Raises InputError or Problems.

    say  is told of an override that a later one of its key takes the place of
    """
    values = _read(path) if path else {}
    settings = _last([setting(each) for each in overrides], say)
    return make(_merged(values, settings), path or "the command line")


def setting(text: str) -> tuple[str, Any]:
    """`key=value`, the value as YAML reads it, but nothing in it is a comment; one of a key that takes text is the text
    that stands there, unless it is in quotes, brackets or braces; text that is no YAML is text.

    Raises InputError without "=".

    >>> setting("optimizer.lr=0.001"), setting("output=a: b: c"), setting("output=007"), setting("output=#2")
    (('optimizer.lr', 0.001), ('output', 'a: b: c'), ('output', '007'), ('output', '#2'))
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise InputError(f"{text!r}: neither a file nor key=value" + ("; write it without spaces" if equals else ""))
    if value and _is_text(key) and not value.startswith(('"', "'", "[", "{")):
        return key, value
    try:
        found = _yaml(value)
        return key, value if _has_comment(value) else found
    except (yaml.YAMLError, ValueError):
        return key, value
    except InputError as error:
        raise InputError(f"{key}: {error}") from error


def _has_comment(text: str) -> bool:
    """Whether YAML would leave the end of a value out.

    >>> _has_comment("a #1"), _has_comment("#1"), _has_comment("['a #1']"), _has_comment("a#1")
    (True, True, False, False)
    """
    node = yaml.compose(text, _DatesAsText)
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:  # which ends past the comment
        node = node.value[-1][-1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    return bool(text[node.end_mark.index if node else 0 :].strip())


def _is_text(key: str) -> bool:
    """Whether a key takes text and no number, so that what looks like a number is a name.

    >>> _is_text("output"), _is_text("optimizer.lr"), _is_text("microbatch_tokens")
    (True, False, False)
    """
    model: type[BaseModel] | None = Config
    kinds: set[Any] = set()
    for name in key.split("."):
        field = model.model_fields.get(name) if model else None
        kinds = set(kinds_of(field.annotation)) if field else set()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return str in kinds and not kinds & {int, float, bool}


def make(values: Mapping[str, Any], where: str = "deft.train", arguments: Sequence[str] = ()) -> Config:
    """A nested mapping -> the configuration; every problem in one error.

    A model that is the folder of an adapter stands for its base, and the adapter to go on from, or with merge=true the
    adapter that is merged.

    arguments  names that the caller takes beside keys, and that a wrong one may have meant
    """
    try:
        return Config.model_validate(_with_base(values))
    except ValidationError as error:
        problems = [_problem(each, arguments) for each in error.errors()]
        raise Problems(f"{where}: the configuration is not valid", problems) from error


def _with_base(values: Mapping[str, Any]) -> Mapping[str, Any]:
    folder, adapter, merge = Path(str(values.get("model"))).expanduser(), values.get("adapter"), values.get("merge")
    merge = SWITCHES.get(str(merge).lower(), merge)
    values = {**values, "merge": merge or None}
    if merge is True and not is_adapter(folder):
        raise InputError(f"merge: {folder} is no adapter; name one: merge=FOLDER")
    if merge is True:
        return {**values, "model": base_of(folder, "merge"), "merge": str(folder)}
    if is_adapter(folder):
        if adapter:
            fix = "leave adapter out to go on with it; merge=true makes it part of its base, for a new one"
            raise InputError(f"model: {folder} is an adapter itself; {fix}")
        return {**values, "model": base_of(folder, "adapter.start"), "adapter": of_folder(folder)}
    if isinstance(adapter, Mapping) and is_adapter(start := Path(str(adapter.get("start"))).expanduser()):
        return {**values, "adapter": {**of_folder(start), **adapter}}
    return values


def changed(config: Config, override: str) -> Config:
    """The configuration with a `key=value` over it."""
    return make(_merged(config.model_dump(mode="json"), [setting(override)]), override)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with double underscores -> nested mappings.

    >>> nested({"epochs": 2, "optimizer__lr": 1e-5})
    {'epochs': 2, 'optimizer': {'lr': 1e-05}}
    """
    return _merged({}, [(key.replace("__", "."), value) for key, value in flat.items()])


def as_yaml(config: Config) -> str:
    """The configuration as a YAML file that gives it back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: str) -> dict[str, Any]:
    file = Path(os.path.expanduser(path))
    try:
        values = _parse(file.read_text(encoding="utf-8"), file.suffix)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a YAML or TOML file, or give key=value") from error
    except (ValueError, InputError) as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: not a configuration; it needs at least the keys model and data")
    return values


def _parse(text: str, suffix: str) -> Any:
    if suffix == ".toml":
        return _toml(text)
    try:
        return _yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


MOST_VALUES = 1_000_000
"""Of a YAML file, those that anchors repeat counted each time."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9_]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?$|[-+]?\.inf$|\.nan$"
    ),
}


class _DatesAsText(yaml.SafeLoader):
    """YAML in which a date is text, as it is in JSON, and 010, 1:30 and 1:30.5 are no numbers to other bases."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML has it
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _yaml(text: str) -> Any:
    """Raises InputError for a mapping with a key twice, of which YAML would take the last, and for one without end."""
    try:
        root = yaml.compose(text, _DatesAsText)
        if root is not None and _values(root, {}) > MOST_VALUES:
            raise InputError(f"its anchors repeat one another to more than {MOST_VALUES:,} values; write them out")
        _stop_if_twice(root)
        return _DatesAsText(text).get_single_data()
    except RecursionError as error:
        raise InputError("it is nested too deeply") from error


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for. Raises InputError for one that holds itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        raise InputError(f"line {node.start_mark.line + 1}: an anchor that holds itself")
    if id(node) not in known:
        known[id(node)] = 0
        inner = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_values(each, known) for each in inner)
    return known[id(node)]


def _stop_if_twice(root: yaml.Node | None) -> None:
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if node is None or isinstance(node, yaml.ScalarNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if not isinstance(node, yaml.MappingNode):
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            line, name = key.start_mark.line + 1, str(key.value)
            if name in lines:
                raise _twice(name, lines[name], line)
            lines[name] = line
            waiting.append(value)


def _toml(text: str) -> Any:
    """Raises InputError for a key or a table twice, with both lines."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        keys = [line.partition("=")[0].strip() for line in text.splitlines()]
        found = re.search(r"line (\d+)", str(error))
        last = int(found[1]) if found else len(keys)
        if "Cannot " in str(error) and keys[last - 1] in keys[: last - 1]:
            first = max(line for line in range(1, last) if keys[line - 1] == keys[last - 1])
            raise _twice(keys[last - 1], first, last) from error
        raise


def _twice(key: str, first: int, last: int) -> InputError:
    where = f"in lines {first} and {last}" if first < last else f"in line {first}"
    return InputError(f"the key {key!r} stands twice, {where}; keep one of them")


def _merged(values: Mapping[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The values with settings over them, sections before what stands in them. InputError where two are of one key."""
    given: dict[str, Any] = {}
    settings = [("data.train" if key == "data" and not _is_section(value) else key, value) for key, value in settings]
    for key, value in settings:
        for leaf, new in _leaves(key, value):
            if leaf in given:
                fix = f" ({leaf}=[a, b] is a list)" if leaf in LISTS else ""
                raise InputError(f"{leaf}: given twice, {_shown(given[leaf])} and {_shown(new)}; give it once{fix}")
            given[leaf] = new
    found = dict(values)
    for key, value in sorted(settings, key=lambda each: each[0].count(".")):
        found = _with(found, key, value)
    return found


def _last(settings: Sequence[tuple[str, Any]], say: Callable[[str], None]) -> list[tuple[str, Any]]:
    """The last setting of each key; all of one that takes a list, as nobody knows whether both are meant."""
    found: dict[str, Any] = {}
    several = [(key, value) for key, value in settings if key in LISTS]
    for key, value in settings:
        if key not in LISTS:
            if key in found and found[key] != value:
                say(f"{key}: given twice, {_shown(found[key])} and {_shown(value)}; the last is taken")
            found[key] = value
    return [*several, *found.items()]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _named(section: Any) -> Any:
    """A name alone stands for the group of keys that has it."""
    return {"name": section} if isinstance(section, str) else section


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping | BaseModel)


def _with(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    if not dot:
        return {**values, head: value}
    inner = values.get(head, {})
    if not isinstance(inner, Mapping):
        inner = {_ALONE[head]: inner} if head in _ALONE and inner is not None else {}
    return {**values, head: _with(inner, rest, value)}


_ALONE = {"data": "train", **dict.fromkeys(("adapter", "optimizer", "loss", "schedule"), "name")}
"""What a value alone says of a group of keys."""


def _problem(error: Mapping[str, Any], arguments: Sequence[str]) -> Problem:
    key = ".".join(str(part) for part in error["loc"] if not _is_union_branch(str(part)))
    if error["type"] == "extra_forbidden":
        return Problem(key, "unknown key", suggestion(key, arguments))
    if error["type"] == "missing":
        return Problem(key, "missing", f"give {key}=...")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return Problem(key, f"{message}, not {_shown(error['input'])}", _way_out(_unnumbered(key), error))


def _is_union_branch(part: str) -> bool:
    return part in ("float", "int", "str", "literal['auto']") or part.startswith(("tuple[", "function-"))


def _unnumbered(key: str) -> str:
    """A key without the places of sources; those of evaluation take what those of training do."""
    return ".".join(part for part in key.split(".") if not part.isdigit()).replace("data.eval.", "data.train.")


def suggestion(key: str, arguments: Sequence[str] = ()) -> str:
    """What an unknown key is called here, or why there is none.

    arguments  names that are taken beside keys

    >>> suggestion("learning_rate"), suggestion("optimizer.lrr")
    ('deft calls it optimizer.lr', "did you mean 'optimizer.lr'?")
    """
    key = _unnumbered(key)
    last = key.rpartition(".")[2].lower().replace("-", "_")
    if last in OTHER_NAMES:
        return f"deft calls it {OTHER_NAMES[last]}"
    if last in NO_KEY:
        return NO_KEY[last]
    if key in keys():
        return f"nest it: {key.replace('.', ': {', 1)}: ...}}"
    ends = {name.rpartition(".")[2]: name for name in reversed(keys())}
    near = closest(key, [*keys(), *arguments]) or closest(last, ends, ends) or closest(last, OTHER_NAMES, OTHER_NAMES)
    return near or f"the keys are {', '.join(Config.model_fields)}"


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
        if field.annotation == tuple[SourceConfig, ...]:
            found += keys(SourceConfig, f"{prefix}{name}.")
    return found


def _way_out(key: str, error: Mapping[str, Any]) -> str:
    """What to write in place of a value that a key does not take."""
    if theirs := OTHER_VALUES.get(key, {}).get(str(error["input"]).lower()):
        return theirs
    if error["type"] == "literal_error":
        choices = [word.strip(" '") for word in error["ctx"]["expected"].replace(" or ", ",").split(",")]
        return closest(str(error["input"]), choices)
    return TAKES.get(key, "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
