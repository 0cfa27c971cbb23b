"""Splits of a token store: which documents of its shards are for training, which for validation."""

import itertools
import os
import pathlib

import numpy as np


def cut_splits(config, parts, group: int) -> dict[str, list[tuple[int, int, int]]]:
    """[(shard, first document, end)] -> the same for each split: the last data.valid_fraction of the documents are for
    validation, or every data.valid_every-th. group: documents that belong together."""
    total, every = sum(end for _, _, end in parts) // group, config.data.valid_every
    left = min(total - 1, max(1, int((1 - config.data.valid_fraction) * total)))
    out, at = {"train": [], "valid": []}, 0  # at: documents before the shard
    for shard, _, end in parts:
        if every:
            held = np.arange(at, at + end) // group % every == every - 1
            borders = [0, *(np.flatnonzero(np.diff(held)) + 1).tolist(), end] if end else []
        else:
            borders = sorted({0, min(end, max(0, left * group - at)), end})
        for first, stop in itertools.pairwise(borders):
            is_valid = held[first] if every else at + first >= left * group
            out["valid" if is_valid else "train"].append((shard, first, stop))
        at += end
    return out


def write_starts(file: pathlib.Path, parts, shards, work) -> dict:
    """Where each document starts in the split, (documents,) int64 -> the split's entry in the manifest."""
    count = sum(end - first for _, first, end in parts)
    info = {"tokens": 0, "documents": count, "bytes": 0, "ranges": []}
    with open(file, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": (count,)})
        for number, first, end in parts:
            lengths, sizes = np.load(work / f"{number:05d}.npy", mmap_mode="r")
            before, tokens = int(lengths[:first].sum()), int(lengths[first:end].sum())
            out.write((np.cumsum(lengths[first:end]) - lengths[first:end] + info["tokens"]).astype("<i8").tobytes())
            if tokens:
                info["ranges"].append([number, before, before + tokens])
            info["tokens"], info["bytes"] = info["tokens"] + tokens, info["bytes"] + int(sizes[first:end].sum())
        out.flush()
        os.fsync(out.fileno())
    return info
