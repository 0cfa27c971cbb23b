"""SIGTERM and SIGINT: a save and a clean end, at a step that all processes agree on."""

import signal

from jaxlm.parallel import distributed


class StopSignal:
    """Asks for a save and a clean end, whichever process the signal reaches; a second one acts at once."""

    def __init__(self, first_step: int):
        self.name, self._received, self._passed_on, self._old = "", False, False, {}
        self.peers = distributed.peers()
        if self.peers:
            self.peers.begin(first_step)
        try:
            self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: the caller handles signals
            pass

    def _handle(self, number, frame):
        if self._received:
            raise KeyboardInterrupt
        self._received, self.name = True, signal.Signals(number).name

    def after(self, step: int) -> bool:
        """Is `step`, just sent to the device, the last one? The same answer in all processes."""
        if self.peers is None:
            return self._received
        if self._received and not self._passed_on:
            self._passed_on = True
            self.peers.request_stop(self.name)
        stop = self.peers.stop_after(step)
        self.name = self.peers.stop_name or self.name
        return stop

    def restore(self):
        for number, old in self._old.items():
            signal.signal(number, old)
