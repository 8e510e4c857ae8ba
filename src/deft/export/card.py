"""README.md of a trained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deft.core import versions
from deft.core.redact import redacted
from deft.dataset.ledger import SourceLedger


def facts_of_run(
    name: str, base_model: str, ledgers: Sequence[SourceLedger], hyperparameters: Mapping[str, Any]
) -> dict[str, Any]:
    """What `model_card` is to say of a run, without secrets."""
    return {
        "name": name,
        "base_model": redacted(base_model),
        "data": [{"path": source.source, "rows": source.rows} for source in ledgers],
        "tokens": sum(source.tokens for source in ledgers),
        "target_tokens": sum(source.target_tokens for source in ledgers),
        "hyperparameters": hyperparameters,
        "versions": versions.installed(),
    }


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md from the facts of a run; sections without facts are left out.

    name             the model's name
    base_model       hub id or folder
    data             [{"path": ..., "rows": ...}, ...]
    tokens, target_tokens     integers, over one epoch; prompts: how it is asked; is_virtual: of virtual tokens alone
    hyperparameters  {name: value}
    versions         {package: version}

    >>> card = model_card(
    ...     {"name": "gsm8k", "base_model": "Qwen/Qwen2.5-0.5B", "data": [{"path": "a.jsonl", "rows": 7}]}
    ... )
    >>> print(card[: card.index("## Load")])
    ---
    base_model: Qwen/Qwen2.5-0.5B
    library_name: transformers
    pipeline_tag: text-generation
    tags:
    - deft
    - sft
    ---
    <BLANKLINE>
    # gsm8k
    <BLANKLINE>
    Qwen/Qwen2.5-0.5B, fine-tuned on demonstrations with deft.
    <BLANKLINE>
    ## Data
    <BLANKLINE>
    | file | rows |
    |---|---|
    | a.jsonl | 7 |
    <BLANKLINE>
    <BLANKLINE>
    """
    name, base = str(facts.get("name", "model")), str(facts.get("base_model", "a pretrained model"))
    is_hub_id = base.count("/") == 1 and not base.startswith((".", "/", "~")) and not Path(base).exists()
    shown = base if is_hub_id else Path(base).name or base
    front: dict[str, Any] = {"base_model": base} if is_hub_id else {}
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["deft", "sft"]}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"{shown}, fine-tuned on demonstrations with deft.",
        *_section("Data", _data_text(facts)),
        *_section("Hyperparameters", _table(("name", "value"), facts.get("hyperparameters", {}).items())),
        *_section("Versions", _table(("package", "version"), facts.get("versions", {}).items())),
        *_section("Load", _load_text(name, facts.get("prompts"), shown if facts.get("is_virtual") else None)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}\n\n{text}"] if text else []


def _table(heading: tuple[str, str], rows: Any) -> str:
    lines = [f"| {_cell(left)} | {_cell(right)} |" for left, right in rows]
    return "\n".join([f"| {heading[0]} | {heading[1]} |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _data_text(facts: Mapping[str, Any]) -> str:
    # Names, not paths: a card is published.
    table = _table(("file", "rows"), [(Path(str(d["path"])).name, d["rows"]) for d in facts.get("data", ())])
    tokens, targets = facts.get("tokens"), facts.get("target_tokens")
    share = f"{targets:,} of {tokens:,} tokens ({targets / tokens:.1%}) were learnt." if tokens and targets else ""
    return "\n\n".join(filter(None, [table, share]))


def _load_text(name: str, prompts: str | None, virtual_of: str | None) -> str:
    asked = f"As in its training, {prompts}.\n\n" if prompts else ""
    if virtual_of is not None:
        return f"""\
```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{asked}Virtual tokens for {virtual_of}, in peft's form: they cannot be merged into it, so that whoever serves them
needs both, and peft. `deft generate` and `deft chat` read this folder as it is."""
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

{asked}An ordinary Hugging Face folder. It can be served as it is, and is both the starting policy and the
reference model for DPO, KTO, GRPO or PPO."""
