"""Tokens as text that can be shown while it is being written."""


class Text:
    """What `add` gives out never has to be taken back: half a character waits for its other bytes, and what may become a stop
    string waits until it is clear."""

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False  # by a stop string, which is not given out
        self._ids, self._shown, self._read, self._held = [], 0, 0, ""

    def add(self, token: int) -> str:
        """-> text that is certain now."""
        self._ids.append(token)
        # Decoded with the tokens just before, since some tokenizers begin a text otherwise than they go on.
        before = self.tokenizer.decode(self._ids[self._shown : self._read])
        text = self.tokenizer.decode(self._ids[self._shown :])
        if text.endswith("\ufffd") or len(text) <= len(before):
            return ""
        self._shown, self._read = self._read, len(self._ids)
        return self._release(self._held + text[len(before) :], whole=False)

    def finish(self) -> str:
        """-> the rest, once no token comes any more."""
        before = self.tokenizer.decode(self._ids[self._shown : self._read])
        rest = self.tokenizer.decode(self._ids[self._shown :])[len(before) :]
        self._shown = self._read = len(self._ids)
        return "" if self.stopped else self._release(self._held + rest, whole=True)

    def _release(self, text: str, whole: bool) -> str:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that a stop string begins with.
        keep = 0 if whole else max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
