"""A signal ends a run at once where nothing can be lost, else when it is safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from deft.core.signals import (
    HANDLED,
    Preempted,
    Signals,
    handled,
)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def train(body: Callable[[Signals, list[str]], None]) -> list[str]:
    """What `body` got done before it was ended, as it must be."""
    done: list[str] = []
    with pytest.raises(Preempted), handled() as signals:
        body(signals, done)
    return done


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_ends_what_is_going_on_and_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    assert train(lambda signals, done: (send(number), done.append("more"))) == []
    assert signal.getsignal(number) is before


def test_deferred_it_waits_for_a_safe_moment() -> None:
    def body(signals: Signals, done: list[str]) -> None:
        with signals.deferred():
            send()
            done.append("step")
            signals.check()
            done.append("more")

    assert train(body) == ["step"]


def test_deferred_it_waits_for_the_end_at_most() -> None:
    def body(signals: Signals, done: list[str]) -> None:
        with signals.deferred():
            send()
            done.append("step")
        done.append("more")

    assert train(body) == ["step"]


def test_deferred_it_comes_where_the_run_may_be_left() -> None:
    def body(signals: Signals, done: list[str]) -> None:
        with signals.deferred():
            send()
            with signals.at_once():
                done.append("more")

    assert train(body) == []


def test_in_the_middle_of_what_may_be_left_it_comes_at_once() -> None:
    def body(signals: Signals, done: list[str]) -> None:
        with signals.deferred(), signals.at_once():
            send()
            done.append("more")

    assert train(body) == []


def test_a_signal_that_a_library_swallowed_comes_back() -> None:
    def body(signals: Signals, done: list[str]) -> None:
        with suppress(BaseException):
            send()
        done.append("swallowed")
        with signals.deferred():
            signals.check()
            done.append("more")

    assert train(body) == ["swallowed"]


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_leaves_at_once() -> None:
    program = (
        "import os, signal\nfrom deft.core.signals import handled\nwith handled() as s, s.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('too long', flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "still here\n")
    assert "Ctrl-C again" in done.stderr


def test_a_ctrl_c_that_torchrun_sends_on_is_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all ranks, and torchrun sends it to them once more."""
    left: list[int] = []
    monkeypatch.setattr(Signals, "_leave", lambda self, number: left.append(number))
    for run_id, times in ((None, 1), ("run", 0)):
        left.clear()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id) if run_id else None
        train(lambda signals, done: deferred_twice(signals))
        assert len(left) == times
    signals = Signals(repeated_within=0.1)
    with pytest.raises(Preempted):
        deferred_twice(signals, signals.arrive, 0.15)
    assert len(left) == 1


def deferred_twice(signals: Signals, send: Callable[[int], None] = send, seconds: float = 0.0) -> None:
    with signals.deferred():
        send(signal.SIGINT)
        time.sleep(seconds)
        send(signal.SIGINT)
