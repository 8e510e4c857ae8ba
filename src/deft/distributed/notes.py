"""JSON that ranks leave for each other in their store: for threads that may use no collective."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from deft.distributed.watch import Watch

PERIOD = 0.02
"""Seconds between two looks for a note."""


@dataclass(frozen=True)
class Notes:
    """Notes under a topic, each of a name of its own. No call blocks the store, so that any thread may use it."""

    watch: Watch
    topic: str

    def leave(self, name: str, value: Any) -> None:
        self.watch.store.set(f"{self.topic}/{name}", json.dumps(value))

    def find(self, name: str) -> Any:
        """What was left under a name; None where nothing is there yet."""
        store, key = self.watch.store, f"{self.topic}/{name}"
        return json.loads(store.get(key)) if store.check([key]) else None

    def take(self, name: str) -> Any:
        """What is left under a name, no None, once it is there. Raises what the run ends with where a rank has failed.

        It does not say that this rank has heard of the fault (`Watch.check`): its main thread may be stuck.
        """
        while True:
            with suppress(RuntimeError):  # A store that is gone is a fault, which the watch finds.
                if (found := self.find(name)) is not None:
                    return found
            if self.watch.fault is not None:
                raise self.watch.fault.ending()
            time.sleep(PERIOD)
