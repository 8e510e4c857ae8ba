"""What final/ takes over from its base: files as they are, config.json with the few keys that training has changed.

transformers 5 rewrites what it reads: a config then has rope_parameters alone, where transformers 4 (and with it many
servers) reads rope_theta and rope_scaling, and falls back to their defaults without a word; a tokenizer_config.json
gets another class. So the base's own documents are carried over, with the keys of both spellings side by side.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from deft.core import files
from deft.core.files import Staging
from deft.core.redact import redacted
from deft.model import weight_files
from deft.model.multimodal import PROCESSOR_FILES
from deft.model.security import INDEX
from deft.training.pieces import serialised

Document = dict[str, Any]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
TEMPLATE = "chat_template.jinja"
OTHER_FILES = (*PROCESSOR_FILES, "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
NAMES_CODE = frozenset({"auto_map", "custom_pipelines", "trust_remote_code"})
"""Keys of a config that make those who load it with trust_remote_code run somebody's code."""


SECRETS = frozenset({"token", "use_auth_token", "auth_token", "hub_token", "hf_token", "access_token", "api_key"})
LONGEST_SECRET = 200
"""A longer text is a template or the like."""

_ATTENTION = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
_OF_DTYPE = ("torch_dtype", "dtype")


def files_of(base: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Names in a model folder that fit a pattern, and the files; a link that leads out of the folder is left out."""
    for path in sorted([*base.glob("*"), *base.glob("additional_chat_templates/*")]):
        name = path.relative_to(base).as_posix()
        is_meant = path.is_file() and any(fnmatch(name, pattern) for pattern in patterns)
        if is_meant and not files.leads_outside(path, base):
            yield name, path


def copy_others(staging: Staging, base: Path) -> None:
    """Processor and licence, as far as nothing of the name has been written."""
    for name, path in files_of(base, OTHER_FILES):
        is_old_template = name == "chat_template.json" and (staging.path / TEMPLATE).exists()
        if not (staging.path / name).exists() and (not is_old_template or (base / TEMPLATE).exists()):
            staging.write(name, [_without_code(path)])


def copy_tokenizer(staging: Staging, base: Path, template: str | None) -> None:
    """The tokenizer's files as they are; `template`, where given, is the one change, in place of all it had."""
    for name, path in files_of(base, TOKENIZER_FILES):
        if template is not None and name.endswith(".jinja"):
            continue
        data = _without_code(path)
        if template is not None and name == "tokenizer_config.json":
            document = json.loads(data)
            if "chat_template" in document:
                data = as_json(document | {"chat_template": template})
        staging.write(name, [data])
    if template is not None:
        staging.write_text("chat_template.jinja", template)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """A tokenizer that training has changed, with a class that transformers 4 knows where 5 has one of its own."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    document = json.loads(path.read_bytes())
    if document.get("tokenizer_class") == "TokenizersBackend":
        path.write_bytes(as_json(document | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _without_code(path: Path) -> bytes:
    """The bytes of a file; of JSON that names code, or has somebody's token or path, without the keys that do."""
    data = path.read_bytes()
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return data
    document = json.loads(data)
    kept = public(document)
    return data if kept == document else as_json(kept)


def public(document: Any) -> Any:
    """A document of a base without what names code, and without what its maker's machine has left at its top.

    >>> public({"auto_map": {}, "token": "hf_a", "_name_or_path": "/home/me/a", "eos_token": "</s>"})
    {'eos_token': '</s>'}
    """
    kept = without(document, NAMES_CODE)
    return {key: each for key, each in kept.items() if not _is_private(key, each)} if isinstance(kept, dict) else kept


def _is_private(key: str, value: Any) -> bool:
    if not isinstance(value, str) or len(value) > LONGEST_SECRET:
        return False
    is_path = key.endswith("name_or_path") and value.startswith(("/", "~"))
    return key in SECRETS or is_path or redacted(value) != value


def without(value: Any, keys: frozenset[str]) -> Any:
    """
    >>> without({"auto_map": {}, "a": [{"auto_map": 1, "b": 2}]}, NAMES_CODE)
    {'a': [{'b': 2}]}
    """
    if isinstance(value, Mapping):
        return {key: without(inner, keys) for key, inner in value.items() if key not in keys}
    return [without(inner, keys) for inner in value] if isinstance(value, list) else value


def as_json(document: Any, sort_keys: bool = False) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()


# --- config.json, generation_config.json -----------------------------------------------------------------------------


def replace_configs(staging: Staging, base: Path, generation: GenerationConfig) -> None:
    """In place of what transformers has written, the base's own documents with what training has changed."""
    path, own = staging.path / "config.json", json.loads((base / "config.json").read_bytes())
    written = json.loads(path.read_bytes())
    path.write_bytes(as_json(config(own, written, staging.path)))
    if (base / GENERATION_CONFIG_NAME).is_file():
        settings = generation_config(json.loads((base / GENERATION_CONFIG_NAME).read_bytes()), generation)
        (staging.path / GENERATION_CONFIG_NAME).write_bytes(as_json(settings))


def generation_config(base: Document, changed: GenerationConfig) -> Document:
    """The base's settings without those that are taken out, with the changed stop and pad tokens.

    >>> changed = GenerationConfig(eos_token_id=[2, 7], temperature=None)
    >>> generation_config({"top_k": 50, "temperature": 0.6, "eos_token_id": 2}, changed)
    {'eos_token_id': [2, 7]}
    """
    kept = {key: value for key, value in base.items() if value is None or getattr(changed, key, value) is not None}
    tokens = {key: getattr(changed, key) for key in ("eos_token_id", "pad_token_id", "use_cache")}
    return public(kept) | {key: value for key, value in tokens.items() if value is not None}


def config(base: Document, written: Document, folder: Path) -> Document:
    """The base's config.json for the trained model.

    written  what transformers writes for it, which says the dtype, the architecture and the size of the vocabulary
    folder   where config.json may be written to be tried

    Beside what transformers 5 calls rope_parameters and dtype stand the old spellings, as long as it reads the same
    config from both.
    """
    changed = {key: written[key] for key in ("architectures",) if key in written and key in base}
    document = without(public(base), _ATTENTION | {"quantization_config"}) | changed
    document = _with_dtype(document, written)
    meant, read = _reads(written, folder), _reads(document, folder)
    every = ((document, meant, read), *((document[key], meant[key], read[key]) for key in _parts(document, written)))
    for part, own, other in every:  # a size that a config does not say is its class's, which need not be the model's
        if own.get("vocab_size") != other.get("vocab_size"):
            part["vocab_size"] = own["vocab_size"]
    both = old_spellings(document)
    return both if _reads(both, folder) == _reads(document, folder) else document


def _with_dtype(document: Document, written: Document) -> Document:
    """The dtype under both names, at the top and where a part has one."""
    for part, theirs in [(document, written), *((document[key], written[key]) for key in _parts(document, written))]:
        if part is document or any(key in part for key in _OF_DTYPE):
            part |= dict.fromkeys(_OF_DTYPE, theirs.get("dtype", written["dtype"]))
    return document


def _parts(document: Document, written: Document) -> list[str]:
    """Keys of the configs inside a config, as of a multimodal model, that the other document has as well."""
    return [
        key
        for key, inner in document.items()
        if isinstance(inner, dict) and isinstance(written.get(key), dict) and key.endswith("_config")
    ]


def old_spellings(document: Document) -> Document:
    """A config, and those inside it, with transformers 4's words for rope_parameters where it lacks them.

    >>> old_spellings({"rope_parameters": {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0}})["rope_scaling"]
    {'rope_type': 'yarn', 'factor': 4.0}
    """
    rope = document.get("rope_parameters")
    inner = {
        key: old_spellings(value) for key, value in document.items() if isinstance(value, dict) and value is not rope
    }
    return document | inner | {key: value for key, value in _old_rope(document).items() if key not in document}


def _old_rope(document: Document) -> Document:
    rope = document.get("rope_parameters")
    if not isinstance(rope, dict) or not rope:
        return {}
    found: Document = {}
    if isinstance(full := rope.get("full_attention"), dict):
        sliding = rope.get("sliding_attention")
        found = {"rope_local_base_freq": sliding["rope_theta"]} if sliding and "rope_theta" in sliding else {}
        rope = full
    theta, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    is_neox = document.get("model_type") == "gpt_neox"
    found |= {} if theta is None else {"rotary_emb_base" if is_neox else "rope_theta": theta}
    found |= {} if share is None else {"rotary_pct" if is_neox else "partial_rotary_factor": share}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "longrope":  # transformers 4 takes these three keys and no other, and the length beside them
        found |= {key: rope[key] for key in ("original_max_position_embeddings",) if key in rope}
        return found | {"rope_scaling": {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}}}
    others = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    return found if kind == "default" else found | {"rope_scaling": others | {"rope_type": kind}}


def _reads(document: Document, folder: Path) -> Document:
    """What transformers reads of a config, without the keys that only say how it is spelled."""
    (folder / "config.json").write_bytes(as_json(document))
    read: Document = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    for key in ("original_max_position_embeddings", "partial_rotary_factor"):  # which rope_parameters have as well
        read.pop(key, None)
    return without(read, frozenset({"rope_scaling", "rope_theta", "rope_local_base_freq", "torch_dtype"}))


# --- weights that are not the model's --------------------------------------------------------------------------------


def copy_weights(staging: Staging, base: Path, names: Collection[str]) -> None:
    """Weights that the model does not take, to the bit, in a file of their own, which the index, if any, lists."""
    places = {name: each.file for name, each in weight_files.stored(base).items() if name in names}
    found: dict[str, Tensor] = {}
    for path in sorted(set(places.values())):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name, place in places.items() if place == path}
    if not found:
        return
    staging.write(weight_files.CARRIED, serialised(found))
    path = staging.path / INDEX
    if path.exists():
        index = json.loads(path.read_bytes())
        index["weight_map"] |= dict.fromkeys(sorted(found), weight_files.CARRIED)
        path.write_bytes(as_json(index))
