"""Packing plans: which pieces of which documents make a row. Made once, beside the store, and memory-mapped.

    <store>/plans/<split>-<packing>-<seq_len>/{ends,starts,lengths}.npy plan.json

Row i is the pieces ends[i-1] up to ends[i]; a piece is `lengths` tokens from `starts` on.
"""

import bisect
import json
import os
import pathlib
import shutil
from typing import NamedTuple

import numpy as np

from jaxlm.errors import UserError
from jaxlm.parallel.distributed import main_first

VERSION = 1
BLOCK = 2**20  # documents planned together: memory does not grow with the text


class Plan(NamedTuple):
    ends: np.ndarray  # (rows,) int64
    starts: np.ndarray  # (pieces,) int64
    lengths: np.ndarray  # (pieces,) int32
    tokens: int

    def padding(self, seq_len: int) -> float:
        """Share of the rows' places that have no token to come."""
        return 1 - (self.tokens - len(self.ends)) / (len(self.ends) * seq_len)


def open_plan(store, packing: str, seq_len: int) -> Plan:
    """store: `TokenStore`. packing: "best_fit", "one". Makes the plan where it does not exist yet."""
    folder = store.folder / "plans" / f"{store.split}-{packing}-{seq_len}-v{VERSION}"
    with main_first("packing plan"):
        if not folder.is_dir():
            make_plan(store, folder, PLANNERS[packing], seq_len)
    arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ("ends", "starts", "lengths")}
    return Plan(**arrays, **json.loads((folder / "plan.json").read_text()))


def make_plan(store, folder: pathlib.Path, planner, seq_len: int) -> None:
    """In a folder beside, which gets the plan's name when it is whole."""
    temporary, tokens, pieces = folder.with_name(f".{folder.name}.{os.getpid()}"), 0, 0
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        with Column(temporary / "ends.npy", "<i8") as ends, Column(temporary / "starts.npy", "<i8") as starts, \
                Column(temporary / "lengths.npy", "<i4") as lengths:
            for first in range(0, len(store.document_starts), BLOCK):
                borders = np.append(store.document_starts[first : first + BLOCK + 1], store.num_tokens)[: BLOCK + 1]
                of_start, of_length = cut(borders, seq_len)
                order, of_end = planner(of_length, seq_len + 1)
                ends.add(of_end + pieces)
                starts.add(of_start[order])
                lengths.add(of_length[order])
                tokens, pieces = tokens + int(of_length[order].sum()), pieces + len(order)
        (temporary / "plan.json").write_text(json.dumps({"tokens": tokens}))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run made the same one meanwhile
                raise
    except OSError as error:
        raise UserError(f"data.store_dir: {folder} cannot be written ({error.strerror or error}); free space, or set "
                        "data.store_dir or $JAXLM_CACHE") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Column:
    """An .npy file of one dimension, written part by part."""

    def __init__(self, file: pathlib.Path, dtype: str):
        self.file, self.dtype, self.count = file, dtype, 0

    def __enter__(self):
        self.out = open(self.file, "wb")
        self._head()
        return self

    def _head(self):
        # A header has room for the longest count, so it can be written over.
        np.lib.format.write_array_header_1_0(self.out, {"descr": self.dtype, "fortran_order": False, "shape": (self.count,)})

    def add(self, values) -> None:
        self.out.write(np.asarray(values, self.dtype).tobytes())
        self.count += len(values)

    def __exit__(self, *raised):
        with self.out:
            self.out.seek(0)
            self._head()
            self.out.flush()
            os.fsync(self.out.fileno())


def cut(borders: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Borders of documents (documents + 1,) -> starts and lengths of pieces of at most seq_len + 1 tokens. The pieces of a long
    document share a token, as rows of a grid do: the last one's target is the next one's first input, and no target is lost."""
    lengths = np.diff(borders)
    counts = np.maximum(lengths > 0, -(-(lengths - 1) // seq_len))
    document = np.repeat(np.arange(len(lengths)), counts)
    place = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * seq_len
    return borders[document] + place, np.minimum(lengths[document] - place, seq_len + 1)


# ---- Planners: lengths of pieces, room in a row -> (the pieces in the order of their rows, end of each row in that order) ------


def one(lengths: np.ndarray, room: int):
    """A row each; a document of one token has no target, and gets none."""
    order = np.flatnonzero(lengths > 1)
    return order, np.arange(1, len(order) + 1)


def best_fit(lengths: np.ndarray, room: int):
    """Best-fit decreasing (Ding et al., arXiv:2404.10830): the longest piece first, each into the row with the least room that
    takes it. Pieces of one length are placed together, rows with one room left too, so it takes few turns."""
    row_of, rows, places = np.zeros(len(lengths), np.int64), 0, {}  # places: room left -> rows
    rooms = []  # the keys of `places`, ascending

    def put(left, some):
        if left and some:
            if left not in places:
                bisect.insort(rooms, left)
            places.setdefault(left, []).extend(some)

    def take(left, count):
        found = places[left][:count]
        places[left] = places[left][count:]
        if not places[left]:
            del places[left], rooms[bisect.bisect_left(rooms, left)]
        return found

    by_length = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[by_length], prepend=-1, append=-1))
    for first, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        length = int(lengths[by_length[first]])
        while first < end:
            at = bisect.bisect_left(rooms, length)
            left = rooms[at] if at < len(rooms) else room
            # A row that took one has less room than before, so is the best fit again while it can take another.
            each, rest = min(left // length, end - first), end - first
            count = rest // each
            if at < len(rooms):
                some = take(left, count)
            else:
                some, rows = list(range(rows, rows + count)), rows + count
            row_of[by_length[first : first + each * len(some)]] = np.repeat(some, each)
            put(left - each * length, some)
            first += each * len(some)
    # Rows by their first document, documents in the order of the text: without shuffling it is read about as it lies.
    firsts = np.full(rows, len(lengths))
    np.minimum.at(firsts, row_of, np.arange(len(lengths)))
    renamed = np.empty(rows, np.int64)
    renamed[np.argsort(firsts)] = np.arange(rows)
    row_of = renamed[row_of]
    return np.argsort(row_of, kind="stable"), np.cumsum(np.bincount(row_of, minlength=rows))


PLANNERS = {"best_fit": best_fit, "one": one}
