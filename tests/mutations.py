"""Protected lines: each is broken in a copy of the source, and the tests named beside it must fail.

    python -m tests.mutations [words ...]     all, or those whose module or tests have one of the words in their name
    python -m tests.mutations --check         only that each line and test is found; it runs nothing

A line is (module, its source, what it becomes, tests). The source must stand in the module exactly once; a test is
the name of a file below tests/, or file::test. Exit code 1 where a line survives or is no longer found, or where a
test fails without a mutation. Nothing is imported before each run but torch and transformers, and each is a fork.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
JOBS = 2


@dataclass(frozen=True, slots=True)
class Mutation:
    """`source`, a text of `module`, becomes `mutated`, and one of `tests` must fail."""

    module: str
    source: str
    mutated: str
    tests: tuple[str, ...]

    @property
    def is_found(self) -> bool:
        """Whether the source stands in its module once, and every test is there."""
        path = self.path(ROOT / "src")
        is_once = path.is_file() and path.read_text(encoding="utf-8").count(self.source) == 1
        return is_once and all(len(_files(test)) == 1 for test in self.tests)

    def path(self, source: Path) -> Path:
        return source.joinpath(*self.module.split(".")).with_suffix(".py")

    def __str__(self) -> str:
        first, other = (text.strip().splitlines() for text in (self.source, self.mutated))
        return f"{self.module}: {first[0].strip()} -> {other[0].strip() if other else '(nothing)'}"


def _of(module: str, source: str, mutated: str, *tests: str) -> Mutation:
    return Mutation(module, source, mutated, tests)


KILLED = "test_law_09_resume.py::test_killed_and_resumed_is_the_same_run"
ABSENT = "test_world.py::test_a_parameter_without_a_gradient_on_one_rank_or_on_all"
ATTENTION = "test_law_06_packing.py::test_attention_equals_its_definition"
UNDO = "    state.drop_gradients()\n    randomness.restore(before)\n"
SHARDED = "test_sharding.py::test_any_number_of_ranks_has_the_bits_of_one"
EXPORT = "test_export.py::test_whatever_differs_is_named"

TABLE: tuple[Mutation, ...] = (
    # Shift, plan and packs.
    _of(
        "deft.plan.loader",
        "targets.append(tokens[1:][predicted])",
        "targets.append(tokens[predicted])",
        "test_law_04_shift.py",
    ),
    _of("deft.plan.loader", "rows.append(predicted + offset)", "rows.append(predicted)", "test_law_04_shift.py"),
    _of("deft.plan.order", "key=[seed, epoch]", "key=[seed, 0]", "test_law_05_plan.py"),
    _of("deft.plan.order", "key=[seed, epoch]", "key=[0, epoch]", "test_law_05_plan.py"),
    _of("deft.plan.packs", "if lengths[index] <= left)", "if left > 0)", "test_law_05_plan.py"),
    _of("deft.plan.loader", "else float(len(members))", "else float(len(parts))", "test_law_05_plan.py"),
    _of(
        "deft.plan.loader",
        "for each in example)\n    return (part",
        "for each in [part])\n    return (part",
        "test_law_05_plan.py",
    ),
    # Memory and time on many GPUs.
    _of("deft.run.scaling", "MOMENTS * whole.trained / shard", "MOMENTS * whole.trained", "test_scaling.py"),
    _of("deft.run.scaling", "2 * groups.largest.plain", "groups.largest.plain", "test_scaling.py"),
    _of("deft.run.scaling", "2 * (copies - 1) / copies * trained / shard", "trained / shard", "test_scaling.py"),
    _of("deft.run.scaling", "(sizes.queries if by_hand", "(0 if by_hand", "test_scaling.py"),
    _of("deft.run.scaling", "2 * layout.replicas * width", "2 * width", "test_forecast.py"),
    _of("deft.run.forecast", "(0 if is_alone else sums)", "sums", "test_forecast.py"),
    _of("deft.commands.scale", "(lengths**2).sum() / lengths.sum()", "lengths.mean()", "test_scale.py"),
    # Loss and accumulation.
    _of(
        "deft.training.step",
        "batch.weights / normalizer",
        "batch.weights / batch.weights.sum()",
        "test_law_08_accumulation.py::test_the_cut_into_micro_batches_does_not_change_the_step",
    ),
    _of(
        "deft.plan.loader",
        "w[1:].sum(dtype=np.float64)) for w in weights",
        "w.sum(dtype=np.float64)) for w in weights",
        "test_law_05_plan.py",
    ),
    _of(
        "deft.training.chunked",
        "logits_BV.mul_(self.weights / self.total)",
        "logits_BV.mul_(1.0 / self.total)",
        "test_law_07_loss.py::test_in_fp64_it_is_the_reference",
    ),
    _of(
        "deft.training.chunked",
        "tanh_SV.square_().neg_().add_(1.0)",
        "tanh_SV.square_().neg_()",
        "test_law_07_loss.py::test_in_fp64_it_is_the_reference",
    ),
    _of(
        "deft.training.chunked",
        "return gradient.mul_(factor)",
        "return gradient",
        "test_law_07_loss.py::test_in_fp64_it_is_the_reference",
    ),
    _of(
        "deft.training.chunked",
        "beta=0.0 if is_first else 1.0",
        "beta=0.0",
        "test_law_07_loss.py::test_chunks_change_nothing",
    ),
    _of(
        "deft.training.step",
        "        total += loss",
        "        total = loss",
        "test_law_08_accumulation.py::test_the_cut_into_micro_batches_does_not_change_the_step",
    ),
    # Several ranks.
    _of(
        "deft.distributed.sums",
        "received[:ranks]",
        "received[:ranks].flip(0)",
        "test_world.py::test_any_number_of_ranks_has_the_bits_of_one",
    ),
    _of("deft.distributed.sums", "received[:ranks]", "received", ABSENT),
    _of("deft.distributed.sums", "-0.0, dtype", "0.0, dtype", ABSENT),
    _of("deft.distributed.sums", "            if count:\n    ", "        ", ABSENT),
    _of(
        "deft.training.step",
        "first + world.rank",
        "first",
        "test_world.py::test_any_number_of_ranks_has_the_bits_of_one",
    ),
    _of(
        "deft.training.step",
        "if odd := [",
        "if odd := [] and [",
        "test_world.py::test_ranks_that_compute_otherwise_are_told",
    ),
    _of("deft.distributed.sharding", "[: layout.computing]", "[: layout.computing].flip(0)", f"{SHARDED}[2-1-0]"),
    _of("deft.distributed.sharding", "start : start + local.numel()", ": local.numel()", f"{SHARDED}[2-1-0]"),
    _of(
        "deft.training.state",
        "rows(name, here.start, here.stop)",
        "rows(name, 0, here.stop - here.start)",
        f"{SHARDED}[2-1-0]",
    ),
    _of("deft.training.optim.adamw", "-len(block) % VECTOR", "0", f"{SHARDED}[3-1-0]"),
    # Attention of packs.
    _of("deft.model.cpu.document_attention", "dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(2)", ATTENTION),
    _of(
        "deft.model.cpu.document_attention",
        "block.start - block.first - block.window,",
        "block.start - block.first - block.window - 1,",
        ATTENTION,
    ),
    _of(
        "deft.model.selftest",
        "if not max(errors) <= min(_tolerance(model), LEAK_SHARE * max(leaks)):",
        "if False:",
        "test_law_06_packing.py::test_a_body_that_breaks_packing_runs_alone",
    ),
    # The update.
    _of(
        "deft.training.optim.adamw",
        "if parameter.ndim >= 2 else 0.0",
        "if parameter.ndim >= 1 else 0.0",
        "test_schedule_and_optimizer.py",
    ),
    _of(
        "deft.training.masters",
        "limit / (norm + 1e-6), max=1.0)",
        "limit / (norm + 1e-6))",
        "test_schedule_and_optimizer.py",
    ),
    _of("deft.training.step", ".grad_norm), clip)", ".grad_norm), None)", "test_step.py"),
    _of("deft.training.step", "state.update(lr,", "state.update(1.0,", "test_step.py"),
    _of("deft.training.masters", "_add(self._sums[name], parameter.grad)", "pass", "test_schedule_and_optimizer.py"),
    _of(
        "deft.plan.schedule",
        "return (step + 1) / (rising + 1)",
        "return step / rising",
        "test_schedule_and_optimizer.py",
    ),
    _of(
        "deft.run.build",
        'model.train(config.dropout == "config")',
        "model.train()",
        "test_train.py::test_dropout_is_off_unless_it_is_asked_for",
    ),
    # A step that is undone or tried leaves nothing behind.
    _of("deft.training.step", UNDO, "    randomness.restore(before)\n", "test_step.py"),
    _of("deft.training.step", UNDO, "    state.drop_gradients()\n", "test_step.py"),
    _of("deft.training.step", "with randomness.preserved():", "if True:", "test_step.py"),
    _of("deft.training.step", "            state.drop_gradients()\n", "            pass\n", "test_step.py"),
    _of("deft.training.badstep", "with randomness.preserved(), causal", "with causal", "test_step.py"),
    _of("deft.training.badstep", "parameter.grad = parameter.grad, None", "_ = parameter.grad, None", "test_step.py"),
    # A user's own loss.
    _of("deft.training.objectives", "with user_code(name):", "if True:", "test_objectives.py"),
    _of("deft.training.objectives", "(_Alias.apply(leaf_KV),", "(leaf_KV,", "test_objectives.py"),
    # Held-out loss.
    _of("deft.evaluation.heldout", "total / weight", "total / max(1, len(examples))", "test_heldout.py"),
    _of(
        "deft.evaluation.heldout",
        "total += float(tally.nll_sum)\n            weight += float(tally.weight_sum)",
        "total += float(tally.nll_sum) / float(tally.weight_sum)\n            weight += 1",
        "test_heldout.py",
    ),
    _of("deft.model.causal_lm", "    model.eval()\n", "", "test_heldout.py"),
    _of("deft.model.causal_lm", "            module.training = True\n", "            pass\n", "test_heldout.py"),
    # Resume, field by field.
    _of(
        "deft.training.resuming",
        'randomness.restore(randomness.from_json(stored.values["random-00000"]))',
        "pass",
        KILLED,
    ),
    _of("deft.training.resuming", 'state.skipped = stored.values["cursor"]["skipped"]', "pass", "test_numbers.py"),
    *(
        _of(
            "deft.training.masters",
            "        mine.copy_(state[key])",
            f'        if not key.startswith("{part}"):\n            mine.copy_(state[key])',
            "test_schedule_and_optimizer.py",
        )
        for part in ("steps", "exp_avg_sq", "weight", "low")
    ),
    _of("deft.training.state", 'buffer.copy_(model[f"buffer.{key}"])', "pass", "test_state.py"),
    _of("deft.training.randomness", '    random.setstate(state["python"])\n', "", "test_state.py"),
    _of("deft.training.randomness", '    np.random.set_state(state["numpy"])\n', "", "test_state.py"),
    _of("deft.training.randomness", '    torch.set_rng_state(state["torch"])\n', "", "test_state.py"),
    _of("deft.training.state", "self.step = step\n", "pass\n", KILLED),
    _of(
        "deft.run.resume",
        "if before.plan != now.plan and not refused:",
        "if False:",
        "test_law_09_resume.py::test_fewer_epochs_than_are_done_are_refused",
    ),
    # The disk.
    _of("deft.core.files", "            staging._finish()\n", "", "test_files.py"),
    _of(
        "deft.core.files",
        "                disk.sync(file)\n                disk.rename(staging, path)\n",
        "                disk.rename(staging, path)\n                disk.sync(file)\n",
        "test_files.py",
    ),
    _of(
        "deft.core.files",
        "            disk.sync(file)\n            self.files[name] = writer.record()",
        "            self.files[name] = writer.record()",
        "test_files.py",
    ),
    _of("deft.core.files", "    Blocks(path, record).check()\n", "", "test_files.py"),
    _of(
        "deft.core.files",
        'if text != _sealed({"files": value["files"], "about": value["about"]}):',
        "if False:",
        "test_files.py",
    ),
    _of("deft.core.files", "zlib.crc32(data) == self._record.blocks[block]", "True", "test_files.py"),
    _of("deft.core.files", "flags | os.O_NOFOLLOW | os.O_CLOEXEC", "flags | os.O_CLOEXEC", "test_files.py"),
    _of("deft.core.files", "    stop_unless_ours(path)\n    try:\n", "    try:\n", "test_lock.py"),
    _of("deft.core.lock", "if is_there and _is_still_there(self.lock, self.path):", "if True:", "test_lock.py"),
    _of(
        "deft.training.checkpoint",
        "        files.verify(place, share=(world.rank, world.size))\n",
        "",
        "test_checkpoint.py",
    ),
    _of(
        "deft.training.resuming",
        '    state.stop_if_broken(f"the update of step',
        '    (f"the update of step',
        "test_state_kept.py",
    ),
    _of("deft.training.checkpoint", "for step in reversed(there):", "for step in there:", "test_checkpoint.py"),
    _of(
        "deft.training.saving",
        "        flush()\n        if state.rows and",
        "        if state.rows and",
        "test_checkpoint.py",
    ),
    _of("deft.training.pieces", "        if own.start != end:\n", "        if False:\n", "test_pieces.py"),
    _of("deft.training.checkpoint", 'if answer["error"]:', "if False:", "test_pieces.py"),
    _of(
        "deft.distributed.owners",
        "lowest.setdefault((rows[0], rows[1]), rank)",
        "lowest[(rows[0], rows[1])] = rank",
        "test_pieces.py",
    ),
    _of(
        "deft.training.saving",
        '            self._retry = self._notes.find("retry")\n',
        "            pass\n",
        "test_pieces.py",
    ),
    _of("deft.export.weights", "found = rounded(found)", "pass", "test_weights.py"),
    _of("deft.export.weights", "complaints += _compared(name, mine, theirs)", "pass", "test_exports.py"),
    _of("deft.core.files", "                del chunk  # before the next one is made\n", "", "test_weights.py"),
    # Masks: the edge, the stop mark, what is literal.
    _of(
        "deft.encoding.edges",
        "tokens.ids[max(0, first) : count] == before and (first == 0",
        "first >= 0 and (first == 0",
        "test_law_02_edge.py",
    ),
    _of("deft.encoding.edges", " or not ids[2 * number].startswith(before)", "", "test_law_02_edge.py"),
    _of(
        "deft.encoding.edges",
        "        if literal:\n            return self.tokenizer.literal(text, continues)\n",
        "",
        "test_law_03_literal.py",
    ),
    _of(
        "deft.encoding.render.stop",
        'return Stop(len(before) + len(mark), "", mark)',
        'return Stop(len(before), "", mark)',
        "test_law_01_prompt.py",
    ),
    _of("deft.encoding.raw", "ids = [*ids, tokenizer.eos_id]", "ids = [*ids]", "test_law_12_seeds.py"),
    _of("deft.encoding.raw", "learnt[0] = 0\n", "pass\n", "test_train.py::test_plain_text_is_learnt_to_the_last_token"),
    # What is held out.
    _of(
        "deft.dataset.splits",
        "else digests < np.uint64(limit)",
        "else np.arange(len(digests)) < share * len(digests)",
        "test_splits.py",
    ),
    _of("deft.dataset.examples", "    yield message.role\n", "", "test_splits.py"),
    _of("deft.dataset.splits", "& ~is_evaluated[rows]", "", "test_splits.py"),
    # The hand-off.
    _of("deft.export.folder", "if not error <= TOLERANCE:", "if False:", EXPORT),
    _of("deft.export.folder", "if not same_bits(tensor, found[name].detach().cpu()):", "if False:", EXPORT),
    _of(
        "deft.export.folder",
        "    stops = _compare_stop_ids(model, tokenizer, reloaded.generation_config, stop_ids)\n",
        "    stops = ()\n",
        EXPORT,
    ),
    _of("deft.export.folder", "    if mine.chat_template != saved.chat_template:", "    if False:", EXPORT),
    _of(
        "deft.export.folder",
        "    _compare_buffers(model, reloaded)\n    served",
        "    served",
        "test_export.py::test_a_model_that_was_trained_with_rounded_positions_is_not_what_is_served",
    ),
)


def main(words: Sequence[str]) -> int:
    chosen = [
        each for each in TABLE if not words or any(word in " ".join([each.module, *each.tests]) for word in words)
    ]
    if lost := [each for each in TABLE if not each.is_found]:
        print("\n".join(f"NOT FOUND {each}" for each in lost))
    if lost or words == ["--check"]:
        return len(lost) > 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("without a mutation ...", flush=True)
        if code := _wait(
            _start(ROOT / "src", sorted({test for each in chosen for test in each.tests}), folder / "log")
        ):
            print((folder / "log").read_text())
            print(f"red without a mutation (exit code {code})")
            return 1
        results = list(_results(chosen, folder))
    survived = [each for each, told in results if told != "killed"]
    print(f"{len(results) - len(survived)} of {len(results)} killed")
    return 1 if survived else 0


def _results(chosen: Sequence[Mutation], folder: Path) -> Iterator[tuple[Mutation, str]]:
    """Each with what became of it, as it becomes known; JOBS at a time."""
    running: dict[int, Mutation] = {}
    waiting = list(chosen)
    while waiting or running:
        while waiting and len(running) < JOBS:
            mutation = waiting.pop(0)
            place = folder / str(len(waiting))
            _copy(mutation, place)
            running[_start(place / "src", mutation.tests, place / "log")] = mutation
        if running:
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            told = {0: "SURVIVED", 1: "killed"}.get(code, f"EXIT CODE {code}")
            yield _told(running.pop(pid), told)


def _told(mutation: Mutation, told: str) -> tuple[Mutation, str]:
    print(f"{told:9} {mutation}", flush=True)
    return mutation, told


def _copy(mutation: Mutation, place: Path) -> None:
    """Writes the package with the mutation in it to `place`/src."""
    shutil.copytree(ROOT / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    path = mutation.path(place / "src")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutation.source, mutation.mutated), encoding="utf-8")


def _start(source: Path, tests: Sequence[str], log: Path) -> int:
    """pytest in a fork, with `source` before all else on the path."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    opened = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)
    os.chdir(ROOT)
    import pytest

    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(_found, tests)]))


def _files(test: str) -> list[Path]:
    return [*(ROOT / "tests").rglob(test.partition("::")[0])]


def _found(test: str) -> str:
    """The path of a test below tests/, wherever it lies."""
    return "".join([str(_files(test)[0]), *test.partition("::")[1:]])


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # noqa: F401  once, before all forks
    import transformers  # noqa: F401

    sys.exit(main(sys.argv[1:]))
