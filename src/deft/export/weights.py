"""The weights of final/, written one tensor at a time: the same bytes, however many ranks hold the model.

The files are those that save_pretrained of transformers writes: their names, what is in which, tied tensors once, and
fused experts one by one where the base has them so. No more is in memory than a tensor, or what is fused in a layer.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from deft.core.errors import DeftError, InputError
from deft.core.files import Staging
from deft.distributed.owners import Owners
from deft.export import carried
from deft.model.security import INDEX
from deft.training.masters import rounded
from deft.training.pieces import bytes_of, header, in_order

PATTERN, LARGEST = "model{suffix}.safetensors", "50GB"
"""Of the files, as save_pretrained has them."""

Made = Callable[[], Tensor | None]


class ExportError(DeftError):
    """What was written is not what was trained: a bug in deft."""


@dataclass(frozen=True)
class Shared:
    """A model that ranks share out, and all of them export.

    owners  of its parameters, by name
    made    parameters that are made of several, by name: fp32 and whole on rank 0, None on the others
    """

    owners: Owners = field(default_factory=Owners)
    made: Mapping[str, Made] = field(default_factory=dict)


@dataclass(frozen=True)
class FinalWeights:
    """The parameters and saved buffers of a model as they are to be written.

    Floating parameters are cast to `dtype`, except those that the architecture keeps in fp32; others stay as they are.

    masters  fp32 by parameter name, on any device; other parameters are the model's own
    shared   where ranks share it out: then model and masters have this rank's rows
    """

    model: Any
    dtype: torch.dtype
    masters: Mapping[str, Tensor] | None = None
    shared: Shared = field(default_factory=Shared)

    def ties(self) -> list[tuple[str, ...]]:
        """The names of each parameter: several where it is tied."""
        names: dict[int, list[str]] = {}
        for name, parameter in self._parameters():
            names.setdefault(id(parameter), []).append(name)
        return [tuple(each) for each in names.values()]

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those that are saved."""
        parameters = {name for name, _ in self._parameters()}
        yield from ((name, tensor) for name, tensor in self.model.state_dict().items() if name not in parameters)

    def part(self, names: tuple[str, ...]) -> Tensor:
        """This rank's rows of a parameter, on its device, or a buffer, as it is to be written.

        Raises InputError where fp16 cannot hold one, or all that is in a whole one becomes 0.
        """
        if names[0] not in dict(self._parameters()):
            return dict(self.buffers())[names[0]].detach()
        return self._as_saved(names[0], self._own(names))

    def vanished(self, names: tuple[str, ...]) -> int:
        """How many of this rank's values of a parameter become 0 as they are written."""
        own = self._own(names)
        return int(own.count_nonzero() - self._as_saved(names[0], own).count_nonzero())

    def _own(self, names: tuple[str, ...]) -> Tensor:
        parameter = dict(self._parameters())[names[0]]
        name = next((name for name in names if self.masters is not None and name in self.masters), None)
        tensor = parameter.detach() if name is None or self.masters is None else self.masters[name].detach()
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        rows = self.shared.owners.rows.get(names[0])
        shape = parameter.shape if rows is None else (rows.stop - rows.start, *rows.shape[1:])
        if tensor.shape != shape:
            raise ExportError(f"{names[0]}: weights of shape {tuple(tensor.shape)} for {tuple(shape)}")
        return tensor

    def whole(self, names: tuple[str, ...]) -> Tensor | None:
        """A whole parameter, or a buffer, on the CPU of rank 0; all ranks have to ask for it."""
        if names[0] in self.shared.made:
            found = self.shared.made[names[0]]()
            if found is not None and self.masters is None and self.model.dtype == torch.bfloat16:
                found = rounded(found)  # as a master's copy is, which rounds ties otherwise
            found = None if found is None else self._as_saved(names[0], found)
        else:
            found = self.shared.owners.gather(names[0], self.part(names))
        return None if found is None else found.to("cpu").contiguous()

    def like(self) -> dict[str, Tensor]:
        """Every name, and its tensor on the meta device as it is to be written."""
        found = {name: torch.empty_like(tensor, device="meta") for name, tensor in self.buffers()}
        parameters = dict(self._parameters())
        for names in self.ties():
            rows, tensor = self.shared.owners.rows.get(names[0]), parameters[names[0]]
            dtype = self._saved_dtype(names[0], tensor)
            shape = tuple(tensor.shape) if rows is None else rows.shape
            found |= dict.fromkeys(names, torch.empty(shape, dtype=dtype, device="meta"))
        return found

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters(remove_duplicate=False)

    def _as_saved(self, name: str, tensor: Tensor) -> Tensor:
        saved = tensor.to(self._saved_dtype(name, tensor))
        if saved.dtype == torch.float16 and not saved.isfinite().all():
            raise _unfit(f"{name} has values beyond 65504, the largest of fp16", saved.dtype)
        is_whole = name not in self.shared.owners.rows
        if is_whole and saved.dtype != tensor.dtype and not saved.any() and tensor.any():
            kind = torch.finfo(saved.dtype)
            small = f"which has no value below {kind.smallest_normal * kind.eps:.1e}"
            what = f"{name} is 0 altogether in {str(saved.dtype).removeprefix('torch.')}, {small}"
            raise _unfit(f"{what} (its largest: {float(tensor.abs().max()):.1e})", saved.dtype)
        return saved

    def _saved_dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        model, dtype = self.model, self.dtype
        if not tensor.is_floating_point():
            return tensor.dtype
        # transformers' own rule (modeling_utils.py, _get_dtype_plan): patterns, some of them only under fp16.
        kept = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
        if dtype == torch.float16:
            kept |= set(model._keep_in_fp32_modules or ())
        return torch.float32 if any(re.search(part.replace("*", ".*"), name) for part in kept) else dtype


@dataclass(frozen=True)
class FileLayout:
    """Which tensor is in which file, and what it is made of.

    files    name of a file -> names of its tensors, and their like on the meta device
    sources  name in a file -> the parameters or buffers, each by all its names, that it is made of
    plain    names in files of tensors that are as they are in the model
    twin     the model without weights, which knows how its base was read
    """

    files: Mapping[str, Mapping[str, Tensor]]
    sources: Mapping[str, tuple[tuple[str, ...], ...]]
    plain: frozenset[str]
    index: Mapping[str, Any] | None
    twin: Any

    def stream(self, weights: FinalWeights, names: list[str]) -> Iterator[Any]:
        """Tensors of a file in that order, whole on rank 0 and None on the others, who all have to take each."""
        ready: dict[str, Tensor | None] = {}
        for name in names:
            if name not in ready:
                sources = self.sources[name]
                found = {each[0]: weights.whole(each) for each in sources}
                if weights.shared.owners.world.is_first:
                    ready |= self._reverted(found)
                else:
                    ready |= dict.fromkeys(each for each, made_of in self.sources.items() if made_of == sources)
                del found
            yield ready.pop(name)

    def _reverted(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = revert_weight_conversion(self.twin, dict(tensors))
        return found


def layout(weights: FinalWeights, twin: Any) -> FileLayout:
    """The files of a model. Raises ExportError where its weights are not those of the plain architecture."""
    like = weights.like()
    if unknown := sorted(twin.state_dict().keys() ^ like.keys()):
        what = "is not a weight of the plain architecture and the model both"
        raise ExportError(f"{type(weights.model).__name__}: {unknown[0]} {what}")
    ties = {name: names for names in weights.ties() for name in names}
    kept = {name: each for name, each in like.items() if name not in (twin._keys_to_ignore_on_save or ())}
    kept = remove_tied_weights_from_state_dict(kept, twin)
    made: dict[str, Tensor] = revert_weight_conversion(twin, dict(kept))
    split = split_state_dict_into_shards_factory(
        made,
        get_storage_size=lambda each: each.untyped_storage().nbytes(),
        get_storage_id=lambda each: each.untyped_storage()._cdata,  # as what was fused stays together
        filename_pattern=PATTERN,
        max_shard_size=LARGEST,
    )
    alone = _each_alone(twin, kept, made)
    every = tuple(ties.get(name, (name,)) for name in kept)
    sources = {name: (ties.get(alone[name], (alone[name],)),) if alone else every for name in made}
    plain = frozenset(name for name in made if alone.get(name) == name and made[name].shape == kept[name].shape)
    index = {
        "metadata": {"total_parameters": twin.num_parameters(), **split.metadata},
        "weight_map": split.tensor_to_filename,
    }
    found = {file: {name: made[name] for name in names} for file, names in split.filename_to_tensors.items()}
    return FileLayout(found, sources, plain, index if split.is_sharded else None, twin)


def _each_alone(twin: Any, kept: Mapping[str, Tensor], made: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in a file -> the one parameter that it is made of; nothing where some are made of several.

    Then all have to be there at once.
    """
    if made.keys() == kept.keys() and all(made[name].shape == kept[name].shape for name in made):
        return {name: name for name in made}
    found: dict[str, str] = {}
    try:
        for name, each in kept.items():
            for target, tensor in revert_weight_conversion(twin, {name: each}).items():
                if target in found or target not in made or tensor.shape != made[target].shape:
                    return {}
                found[target] = name
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):  # of a converter that lacks the others
        return {}
    return found if found.keys() == made.keys() else {}


def write(staging: Staging | None, weights: FinalWeights, twin: Any) -> None:
    """Every file of the weights, on rank 0; the other ranks, without a folder, send what they hold."""
    found = layout(weights, twin)
    for file, like in found.files.items():
        tensors = found.stream(weights, in_order(like))
        if staging is None:
            deque(tensors, maxlen=0)
        else:
            staging.write(file, chain([header(like, {"format": "pt"})], map(bytes_of, tensors)))
    if found.index is not None and staging is not None:
        (staging.path / INDEX).write_bytes(carried.as_json(found.index, sort_keys=True))


def difference(folder: Path, weights: FinalWeights, twin: Any) -> str:
    """What is not as it was to be written: this rank's own rows of each tensor against the file; "" for nothing.

    What is made of others, as with an adapter added, is made again on rank 0: all ranks have to ask.
    """
    found = layout(weights, twin)
    complaints: list[str] = []
    for file, like in found.files.items():
        with safe_open(folder / file, "pt") as stored:
            again = []
            for name in in_order(like):
                names = found.sources[name][0]
                if name not in found.plain or names[0] in weights.shared.made:
                    again.append(name)
                    continue
                rows, mine = weights.shared.owners.rows.get(names[0]), weights.part(names).to("cpu")
                theirs = stored.get_tensor(name) if rows is None else stored.get_slice(name)[rows.start : rows.stop]
                complaints += _compared(name, mine, theirs)
            for name, tensor in zip(again, found.stream(weights, again), strict=True):
                complaints += _compared(name, tensor, stored.get_tensor(name)) if tensor is not None else []
    return next(iter(complaints), "")


def _compared(name: str, meant: Tensor, found: Tensor) -> list[str]:
    return [] if same_bits(meant, found) else [f"{name}: {described_difference(meant, found)}"]


def same_bits(meant: Tensor, found: Tensor) -> bool:
    if meant.shape != found.shape or meant.dtype != found.dtype:
        return False
    return torch.equal(meant.contiguous().view(torch.uint8), found.contiguous().view(torch.uint8))


def described_difference(meant: Tensor, found: Tensor) -> str:
    if meant.shape != found.shape or meant.dtype != found.dtype:
        return f"{found.dtype} {tuple(found.shape)} was exported for {meant.dtype} {tuple(meant.shape)}"
    # Where bits differ but not values, as in -0.0 and 0.0, the count is 0 and the text still says so.
    return f"{int((meant != found).sum())} of {meant.numel()} exported values differ from those in memory"


def _unfit(what: str, dtype: torch.dtype) -> InputError:
    others = "bf16 or fp32" if dtype == torch.float16 else "fp32"
    return InputError(f"export.dtype: {what}; run the same command again with export.dtype={others}")
