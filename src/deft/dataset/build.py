"""Sources -> examples and the ledger: the data half from end to end.

A source is read twice: once to know that all of it can be read and what it is (`survey`), once to encode it. What comes
of either is kept in the cache, where the source's content has a digest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, get_args

from deft.core import workers
from deft.core.errors import InputError
from deft.core.files import Staging
from deft.core.registry import closest
from deft.data import held as in_memory
from deft.data import sources
from deft.data.format import Choices
from deft.data.shapes import Survey
from deft.dataset import cache as caches
from deft.dataset import data_warnings, examples, ledger, survey
from deft.dataset import store as stores
from deft.dataset.encoded_rows import EncodedRows, TrainerRow
from deft.dataset.examples import Recipe
from deft.dataset.ledger import SourceLedger
from deft.dataset.source import SourceSpec, items
from deft.dataset.splits import ContentIndex, SplitRows, SplitRule, assign_splits
from deft.dataset.store import EncodedChunk, Examples, Store
from deft.dataset.survey import NOT_KEPT, Execution
from deft.encoding import tokenizer as edge
from deft.encoding.raw import Side
from deft.encoding.render.chat import AnswerRules, Reasoning
from deft.encoding.rows import Overflow, Policy, Render, RowEncoder, TrainOn

Surveyed = tuple[SourceSpec, Survey]


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is trained on, what is held out, and what became of every row.

    train  has an example as often as it is learnt in an epoch
    marks  what ended learnt turns of chats
    """

    train: Examples
    held_out: Examples
    ledgers: tuple[SourceLedger, ...]
    marks: frozenset[str]


def encode_sources(
    train: Sequence[Surveyed],
    row_encoder: RowEncoder,
    *,
    held_out: Sequence[Surveyed] = (),
    share: float = 0.0,
    seed: int = 0,
    execution: Execution = NOT_KEPT,
) -> Dataset:
    """Encodes sources, and the ledgers of all.

    held_out  sources of their own for evaluation: a row of theirs is not trained, wherever it stands
    share     of the training rows by content hash that is held out
    seed      draws the rows of sources with `times`
    """
    every, identity = [*train, *held_out], _identity(row_encoder)
    found = [store(*each, row_encoder, execution, identity) for each in every]
    marks = frozenset(mark for each in found for mark in each.marks)
    stop_ids = data_warnings.stop_ids(row_encoder, marks)
    training, evaluated = ContentIndex.of(found[: len(train)]), ContentIndex.of(found[len(train) :])
    split = [
        *_split(train, training, evaluated, SplitRule(share, seed=seed, stop_ids=stop_ids)),
        *_split(held_out, evaluated, ContentIndex.of(), SplitRule(is_eval=True, seed=seed, stop_ids=stop_ids)),
    ]
    return Dataset(
        Examples(tuple(each.train() for each in split)),
        Examples(tuple(each.held_out() for each in split)),
        tuple(
            ledger.account(source.path, found.shape, rows, found.unread)
            for (source, found), rows in zip(every, split, strict=True)
        ),
        marks,
    )


def _split(surveyed: Sequence[Surveyed], own: ContentIndex, others: ContentIndex, rule: SplitRule) -> list[SplitRows]:
    """The fates of the rows of sources whose stores are those of `own`."""
    found = enumerate(zip(surveyed, own.stores, own.repeated(), strict=True))
    return [
        assign_splits(each, rule.of(source, number), others, repeated)
        for number, ((source, _), each, repeated) in found
    ]


def store(
    source: SourceSpec, found: Survey, row_encoder: RowEncoder, execution: Execution, identity: str = ""
) -> Store:
    """The rows of a source, encoded: from the cache, or made and put there.

    identity  of the encoder, where it is known already: finding it reads the whole vocabulary
    """
    chunks = partial(_chunks, source, found, row_encoder, execution)
    if execution.cache is None or not found.content:
        return Store.in_memory(chunks())
    key = caches.digest([survey.key(source, found.content), identity or _identity(row_encoder)])
    folder, manifest = execution.cache.get(key, lambda staging: _write(staging, source, found, chunks()))
    return stores.read(folder, manifest.about)


def _write(staging: Staging, source: SourceSpec, found: Survey, chunks: Iterable[EncodedChunk]) -> None:
    stop_if_changed = caches.watch(source.path, source.files())
    stores.write(staging, chunks)
    if not sources.is_on_the_hub(source.path) and caches.file_digests(found.content) != found.content:
        raise InputError(f"{source.path}: changed while it was read; start again")
    stop_if_changed()


def _chunks(source: SourceSpec, found: Survey, row_encoder: RowEncoder, execution: Execution) -> Iterator[EncodedChunk]:
    recipe = Recipe.of(row_encoder, source, found.shape)
    for chunk in workers.ordered(examples.maker, recipe, items(source, found.left_out), execution.processes):
        execution.advance(chunk.batch.num_rows)
        yield chunk


def _identity(row_encoder: RowEncoder) -> str:
    """The digest of all that tokens depend on beside their rows."""
    tokenizer, template = row_encoder.tokenizer, row_encoder.renderer.template
    special = [tokenizer.special_tokens, tokenizer.bos_id, tokenizer.eos_id, tokenizer.puts_bos, tokenizer.hf.eos_token]
    texts = [tokenizer.hf.backend_tokenizer.to_str(), special, template.source, template.tokens]
    return caches.digest([texts, asdict(row_encoder.renderer.marks), asdict(row_encoder.policy), caches.code()])


def encode(
    rows: Iterable[Any],
    tokenizer: Any,
    *,
    train_on: TrainOn | None = None,
    render: Render = "auto",
    template: str = "auto",
    max_length: int = 2048,
    overflow: Overflow = "turns",
    truncation_side: Side = "right",
    template_kwargs: Mapping[str, Any] | None = None,
    reasoning: Reasoning = "auto",
    learn_reasoning: bool = True,
    learn_tool_calls: bool = True,
    format: str = "auto",  # noqa: A002  the name of the setting
    columns: Mapping[str, str] | None = None,
) -> EncodedRows:
    """Rows in any shape that deft reads -> ids and weights, for any trainer.

        batch = deft.encode([{"prompt": "2 + 2?", "completion": " 4."}], tokenizer)
        Trainer(model, args, train_dataset=batch, data_collator=deft.collator(tokenizer))

    rows             a list, a generator, a data set of `datasets`, a table of pandas, polars or pyarrow
    tokenizer        a fast Hugging Face tokenizer, or the folder of one
    format, columns  as those of a source: how rows are read, and what they call the fields

    An item has `input_ids`, `attention_mask` and `labels` as a mapping has them, and `.tokens`, `.weights`, `.labels`
    and `.origin`. A row that its template forces into several texts, or that holds several conversations, gives several
    items with one origin; rows that are refused, left out, too long or without a target are in `refused` with their
    reason. Warns of fields that nothing reads, and where weights say more than labels can. Raises InputError for what
    is no list of rows or an unknown value, Problems where the rows have no common shape.
    """
    _stop_if_unknown(train_on=train_on, render=render, overflow=overflow, truncation_side=truncation_side)
    _stop_if_unknown(reasoning=reasoning)
    if not isinstance(max_length, int) or max_length < 2:
        raise InputError(f"max_length: {max_length!r} is no length of an example; at least 2")
    held = edge.of(tokenizer)
    chosen = examples.template_of(held, template)
    rules = AnswerRules(reasoning, learn_reasoning, learn_tool_calls)
    policy = Policy(max_length, train_on, render, overflow, truncation_side, rules, template_kwargs or {})
    alone = Execution(processes=1)
    held_rows = in_memory.rows(rows, "rows", "read its rows first, or train on it: deft.train(model, data=...)")
    spec = SourceSpec("rows", format, rows=held_rows, choices=Choices(columns or {}))
    ((source, found),) = survey.understand([spec], alone)
    done = store(source, found, examples.encoder(held, chosen, policy), alone)
    every = [done.examples_of(row) for row in range(len(done))]
    refused = tuple((done.origin(row), str(done.value(row, "reason"))) for row, found in enumerate(every) if not found)
    kept = [TrainerRow(part.origin, part.tokens, part.weights) for found in every for each in found for part in each]
    _warn(survey.not_read([(source, found)]), kept)
    return EncodedRows(tuple(kept), refused)


def _warn(lines: Sequence[str], rows: Sequence[TrainerRow]) -> None:
    """Warns of each line, and of weights that labels cannot say."""
    for line in lines:
        warnings.warn(line, stacklevel=3)
    if weighed := [row for row in rows if not row.is_in_labels]:
        what = f"{weighed[0].origin} has weights other than 0 and 1 (of {len(weighed)} such rows the first)"
        warnings.warn(f"{what}, which labels cannot say: a trainer learns all its labels alike", stacklevel=3)


CHOICES: dict[str, tuple[Any, ...]] = {
    "train_on": (None, *get_args(TrainOn)),
    "render": get_args(Render),
    "overflow": get_args(Overflow),
    "truncation_side": get_args(Side),
    "reasoning": get_args(Reasoning),
}


def _stop_if_unknown(**given: Any) -> None:
    """InputError for a value that is none of CHOICES.

    >>> _stop_if_unknown(train_on="asistant")
    Traceback (most recent call last):
    deft.core.errors.InputError: train_on: 'asistant' is not there; did you mean 'assistant'?
    """
    for name, value in given.items():
        if value not in CHOICES[name]:
            names = [each for each in CHOICES[name] if each]
            raise InputError(f"{name}: {value!r} is not there; {closest(str(value), names) or f'there is {names}'}")
