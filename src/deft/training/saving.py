"""Saves while training goes on: the state is copied, and a thread writes the copy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from deft.core.errors import DiskError, InputError
from deft.distributed.notes import Notes
from deft.distributed.owners import Owners, agree
from deft.distributed.world import World
from deft.training import checkpoint
from deft.training.checkpoint import Checkpoint, Keep


@dataclass
class Saver:
    """Saves every `every` steps. A save that fails is told, and tried again half an interval later.

    Of a state that ranks share out, each has one, and all of them begin the same saves: rank 0 says when one that
    failed is tried again, before it goes into the next step with the others.

    folder  that of the checkpoints
    every   steps; None saves nothing
    say     tells the user
    newest  the step of the newest checkpoint
    """

    folder: Path
    every: int | None
    keep: Keep
    say: Callable[[str], None]
    newest: int = 0
    world: World = field(default_factory=World)
    _owners: Owners | None = None
    _notes: Notes | None = None
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "saving"))
    _running: tuple[Checkpoint, Future[None]] | None = None
    _failed: DiskError | None = None
    _retry: int | None = None

    def is_due(self, step: int, total: int) -> bool:
        """Whether to save after this step. Says what became of a save that has ended since."""
        if self._running and self._running[1].done():
            self._settle(step)
        if self.every is None:
            return False
        if self._notes and not self.world.is_first and (self._running or self._failed):
            self._retry = self._notes.find("retry")
        return step == total or step % self.every == 0 or (self._retry is not None and step >= self._retry)

    def begin(self, state: Checkpoint, flush: Callable[[], None]) -> None:
        """Writes `state`, which must be a copy of its own, once the save before it has ended.

        flush  brings the logs up to this step onto the disk: a checkpoint never comes without them
        """
        self._settle(state.step)
        self._retry = None
        if state.rows and self.world.watch:
            self._notes = Notes(self.world.watch, f"save/{next(self.world.watch.questions)}/{state.step}")
        self._running = state, self._pool.submit(self._write, state, flush)

    def finish(self) -> DiskError | None:
        """Waits for the last save; what was wrong with it."""
        self._settle(None)
        return self._failed

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        """A save that has begun is brought to its end, whatever ended the training."""
        self._pool.shutdown()

    def _write(self, state: Checkpoint, flush: Callable[[], None]) -> None:
        flush()
        if state.rows and self._notes:
            if self._owners is None or self._owners.rows.keys() != state.rows.keys():  # a rule's tensors come with time
                self._owners = agree(self._notes.topic, state.rows, self.world)
            checkpoint.write_own(self.folder, state, self._owners, self._notes)
        else:
            checkpoint.write(self.folder, state)
        if self.world.is_first:
            checkpoint.retain(self.folder, self.keep)

    def _settle(self, step: int | None) -> None:
        """Waits for the running save and says what was wrong with it; `step` is the present one, None at the end."""
        if self._running is None:
            return
        (state, future), self._running = self._running, None
        self._failed = None
        try:
            future.result()
            self.newest = state.step
        except (DiskError, InputError) as error:
            what = checkpoint.unsaved(self.folder, state, error)
            self._failed = DiskError(what)
            if step is not None and self.every is not None:
                self._retry = step + max(1, self.every // 2)
                if self._notes and self.world.is_first:
                    self._notes.leave("retry", self._retry)
                self.say(f"{what}. Training goes on, next try at {self._retry}")
