"""Rows of whole examples: row i of a split as a pure function of i, as in `jaxlm.data.packing`."""

from typing import NamedTuple

import numpy as np

from jaxlm.data.plans import best_fit
from jaxlm.errors import UserError


class Source(NamedTuple):
    """Of an encoder-decoder's rows: what goes to the encoder."""

    length: int  # S
    start: int  # the id that the decoder's text begins with
    end: int | None  # the id that the encoder's text ends with


class ExampleRows:
    """Rows of whole examples (`jaxlm.data.examples`) side by side, each a segment of its own. The loss is on what is to be told.

    An example that is longer than a row loses the end of its prompt or, by its form, its own end or the beginning of its
    prompt; one that has nothing to be told then is left out. packing: "best_fit", "one". source: of an encoder-decoder: what is
    given goes to the encoder. documents: numbers of those that count; None: all.
    """

    def __init__(self, store, seq_len: int, form, packing: str, source: Source | None = None, documents=None):
        self.store, self.seq_len, self.form, self.source, self.packing = store, seq_len, form, source, packing
        self.num_bytes = store.num_bytes if form.group == 1 else 0  # the loss of a preference is not of text
        self.starts = np.append(store.document_starts, store.num_tokens)
        told_at = np.flatnonzero(store.marks(0, store.num_tokens))
        place = np.searchsorted(told_at, self.starts)
        lengths, told = np.diff(self.starts), np.diff(place)
        first = np.where(told > 0, np.append(told_at, 0)[place[:-1]] - self.starts[:-1], lengths)
        self.room, self.what_cut = seq_len // form.group, ""
        if source:
            sources = np.minimum(first + (source.end is not None), source.length)
            needs, usable = np.maximum(-(-sources * seq_len // source.length), np.minimum(told, seq_len)), told > 0
            self.num_cut = int(np.sum((told > seq_len) | (first + (source.end is not None) > source.length)))
        else:
            usable = (told > 0) & (lengths > 1) & ((form.cut != "end") | (first <= self.room))
            if form.cut == "prompt_start":
                self.spans, cut = fit_answers(first, lengths, self.room + 1, form.group)
                self.num_cut, needs = int(cut.any(1).sum()), self.spans[1] - self.spans[0] - 1
                prompts, answers = cut.sum(0)
                self.what_cut = f" ({prompts:,} lost the beginning of the prompt, {answers:,} the end of an answer)"
            else:
                self.num_cut, needs = int(np.sum(lengths - 1 > self.room)), np.minimum(lengths - 1, self.room)
        needs, usable = needs.reshape(-1, form.group).sum(1), usable.reshape(-1, form.group).all(1)
        wanted = np.arange(len(needs)) if documents is None else np.asarray(documents)
        self.examples = wanted[usable[wanted]]
        self.num_left_out = len(wanted) - len(self.examples)
        if not len(self.examples):
            raise UserError(f"data.form={form.__name__.lower()}: no example of the {store.split} split has anything to be told; "
                            "check data.prompt and data.target, or raise seq_len")
        needs = needs[self.examples]
        self.order, self.ends = best_fit(needs, seq_len) if packing == "best_fit" else (
            np.arange(len(needs)), np.arange(1, len(needs) + 1))
        self.padding = 1 - needs.sum() / (len(self.ends) * seq_len)

    def __len__(self) -> int:
        return len(self.ends)

    def take(self, indices, offsets=0) -> dict[str, np.ndarray]:
        """As `packing.PackedRows.take`, with source_tokens, source_segment_ids, source_positions (B, S) for an
        encoder-decoder; there is no grid to move."""
        B, T, source = len(indices), self.seq_len, self.source
        out = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        out["loss_mask"] = np.zeros((B, T), np.float32)
        if source:
            out |= {f"source_{name}": np.zeros((B, source.length), np.int32) for name in ("tokens", "segment_ids", "positions")}
        for row, i in enumerate(indices):
            at = source_at = segment = 0
            for example in self.examples[self.order[int(self.ends[i - 1]) if i else 0 : int(self.ends[i])]].tolist():
                for document in range(example * self.form.group, (example + 1) * self.form.group):
                    ids, marks = self.document(document)
                    segment += 1
                    if source:
                        told = int(np.argmax(marks))
                        given = ids[:told] if source.end is None else np.append(ids[:told][: source.length - 1], source.end)
                        given, ids, marks = given[: source.length], ids[told - 1 :][: T + 1].copy(), marks[told - 1 :][: T + 1]
                        ids[0] = source.start
                        fill(out, "source_", row, source_at, segment, given)
                        source_at += len(given)
                    fill(out, "", row, at, segment, ids[:-1])
                    out["targets"][row, at : at + len(ids) - 1] = ids[1:]
                    out["loss_mask"][row, at : at + len(ids) - 1] = marks[1:]
                    at += len(ids) - 1
        return out

    def document(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids, marks), cut to what a row has room for."""
        start, stop, room = int(self.starts[number]), int(self.starts[number + 1]), self.room + 1
        ids, marks = self.store.tokens(start, stop), self.store.marks(start, stop)
        if self.form.cut == "prompt_start":
            kept = slice(*self.spans[:, number])
            return ids[kept], marks[kept]
        if self.source or stop - start <= room:
            return ids, marks
        if self.form.cut == "prompt_end":  # what is to be told comes last
            first = int(np.argmax(marks))
            told = min(stop - start - first, room - 1)
            kept = np.r_[0 : room - told, first : first + told]
            return ids[kept], marks[kept]
        return ids[:room], marks[:room]

    def about(self) -> tuple[str, ...]:
        cut = f", {self.num_cut:,} examples cut to fit{self.what_cut}" if self.num_cut else ""
        left_out = f", {self.num_left_out:,} with nothing to be told left out" if self.num_left_out else ""
        return (f"{len(self.examples):,} examples, {self.packing} packing: {len(self):,} rows, {self.padding:.2%} padding{cut}"
                f"{left_out}",)


def fit_answers(first, lengths, room: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Of examples of `group` documents, each a prompt of `first` tokens and an answer, what fits into `room` tokens: the prompts
    lose their beginning, as much as the longest answer needs, but keep half of the room; an answer that does not fit then loses
    its end. So do TRL's prompts and answers (max_prompt_length, half of max_length by default, and what that leaves).

    first, lengths: (documents,). -> (the tokens that are kept, first and end (2, documents); whether an example lost of (prompts,
    answers), (examples, 2)).
    """
    answers = lengths - first
    longest = np.repeat(answers.reshape(-1, group).max(1), group)
    prompts = np.minimum(first, np.maximum(room - longest, room // 2))
    kept = np.minimum(answers, room - prompts)
    cut = np.stack([prompts < first, kept < answers], 1).reshape(-1, group, 2).any(1)
    return np.stack([first - prompts, first + kept]), cut


def fill(out, prefix: str, row: int, at: int, segment: int, ids) -> None:
    span = slice(at, at + len(ids))
    out[f"{prefix}tokens"][row, span], out[f"{prefix}segment_ids"][row, span] = ids, segment
    out[f"{prefix}positions"][row, span] = np.arange(len(ids))
