"""Saves while training goes on: the state is copied, and a thread writes the copy."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from deft.core.errors import DiskError, InputError
from deft.training import checkpoint
from deft.training.checkpoint import Checkpoint, Keep


@dataclass
class Saver:
    """Saves every `every` steps. A save that fails is told, and tried again half an interval later.

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
        return step == total or step % self.every == 0 or (self._retry is not None and step >= self._retry)

    def begin(self, state: Checkpoint, flush: Callable[[], None]) -> None:
        """Writes `state`, which must be a copy of its own, once the save before it has ended.

        flush  brings the logs up to this step onto the disk: a checkpoint never comes without them
        """
        self._settle(state.step)
        self._retry = None
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
        checkpoint.write(self.folder, state)
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
                self.say(f"{what}. Training goes on, next try at {self._retry}")
