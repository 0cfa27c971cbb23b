"""A watch over progress: a run that hangs ends, with the stack of every thread, instead of waiting for ever."""

import math
import threading
import time

SLOW = 6  # compiling, restoring, saving and evaluating may take this many times as long as a step


class Watchdog:
    """Calls `on_hang(message)` in a thread of its own once there was no `beat` for the time allowed.

    Args:
        seconds: allowed between steps; 0 turns the watch off. It begins with the first `beat`: what comes before, such as
            making a token store of a large text, takes the time it takes.
    """

    def __init__(self, seconds: float, on_hang):
        self.seconds, self.on_hang = seconds, on_hang
        self.closed = threading.Event()
        self.beat("starting", math.inf)
        if seconds:
            threading.Thread(target=self._watch, name="jaxlm-watchdog", daemon=True).start()

    def beat(self, doing: str = "training", allowance: float = 1) -> None:
        """The run lives; what it does next may take `allowance` x `seconds`."""
        self.doing, self.allowance, self.idle = doing, allowance, 0.0

    def _watch(self):
        tick, last = max(0.05, min(5.0, self.seconds / 10)), time.monotonic()
        while not self.closed.wait(tick):
            now = time.monotonic()
            self.idle += min(now - last, 2 * tick)  # the time that this process itself was stopped does not count
            last = now
            if self.idle > self.allowance * self.seconds:
                self.on_hang(f"no progress for {self.allowance * self.seconds:.0f} s while {self.doing} "
                             "(observe.hang_seconds)")
                return

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed.set()
