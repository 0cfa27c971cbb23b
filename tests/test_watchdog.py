"""The watch over progress."""

import threading
import time

from jaxlm.observe.watchdog import Watchdog


def watch(seconds):
    said, event = [], threading.Event()
    return Watchdog(seconds, lambda message: (said.append(message), event.set())), said, event


def test_it_waits_for_the_first_beat_then_speaks_once_in_time():
    watchdog, said, event = watch(0.3)
    with watchdog:
        assert not event.wait(0.8)
        watchdog.beat()
        began = time.monotonic()
        assert event.wait(5) and 0.25 < time.monotonic() - began < 3
        time.sleep(0.5)
    assert said == ["no progress for 0 s while training (observe.hang_seconds)"]


def test_beats_and_allowances_hold_it_off_and_closing_ends_it():
    watchdog, said, _ = watch(0.5)
    with watchdog:
        for _ in range(8):
            watchdog.beat()
            time.sleep(0.1)
        watchdog.beat("compiling", 20)
        time.sleep(1.0)
        watchdog.beat()
    time.sleep(1.0)
    assert said == []


def test_zero_turns_it_off():
    watchdog, said, event = watch(0)
    with watchdog:
        watchdog.beat()
        assert not event.wait(0.3)
