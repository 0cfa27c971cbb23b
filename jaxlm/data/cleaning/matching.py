"""Which documents are duplicates: buckets are compared in parts of the key space, each by itself; then clusters are made.

A document is a number: shard * 2^32 + row, so that their order is that of the documents. Memory: a part holds at most about
PART_ENTRIES keys; the clusters need 16 bytes for each pair that was found.
"""

import functools
import pathlib

import numpy as np

from jaxlm.data.cleaning.shards import open_sketch, written_whole

PART_ENTRIES = 2**22
BATCH = 2**15  # pairs compared at once


def parts_of(num_keys: int, documents: int) -> list[tuple[int, int, int]]:
    """(key column, part, parts): equal ranges of the keys, which are hashes."""
    count = -(-documents // PART_ENTRIES) or 1
    return [(column, part, count) for column in range(num_keys) for part in range(count)]


def match(sketches: list[pathlib.Path], threshold: float, column: int, part: int, parts: int) -> np.ndarray:
    """-> int64 (pairs, 2): a document, and an earlier one of the same bucket with a similar signature. In a bucket, each is
    compared with the first; those unlike it are compared with the first of them; and so on. So of two that are not in
    one cluster by this bucket, no earlier leader was like either, and they were compared."""
    first = np.uint64(part * 2**64 // parts)
    last = np.uint64((part + 1) * 2**64 // parts - 1)
    all_keys, all_documents = [], []
    for number, sketch in enumerate(sketches):
        keys = open_sketch(sketch, "keys")
        if not keys.shape[1]:
            continue
        start, stop = np.searchsorted(keys[column], first, "left"), np.searchsorted(keys[column], last, "right")
        all_keys.append(np.array(keys[column, start:stop]))
        all_documents.append(open_sketch(sketch, "rows")[column, start:stop].astype(np.int64) + (number << 32))
    if not all_keys:
        return np.empty((0, 2), np.int64)
    keys, documents = np.concatenate(all_keys), np.concatenate(all_documents)
    order = np.argsort(keys, kind="stable")  # within a key the documents stay in their order
    keys, documents = keys[order], documents[order]
    pairs = []
    while True:
        begins = np.concatenate([[True], keys[1:] != keys[:-1]])
        leader = np.flatnonzero(begins)[np.cumsum(begins) - 1]
        others = np.flatnonzero(~begins)
        if not len(others):
            return np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)
        candidates = np.stack([documents[others], documents[leader[others]]], 1)
        alike = similar(sketches, candidates, threshold)
        pairs.append(candidates[alike])
        keys, documents = keys[others[~alike]], documents[others[~alike]]


def similar(sketches, pairs, threshold: float) -> np.ndarray:
    """-> bool (pairs,). Signatures are read a batch at a time."""
    opened = functools.lru_cache(maxsize=256)(lambda shard: open_sketch(sketches[shard], "signatures"))

    def signatures(documents):
        shards, rows = documents >> 32, documents & 0xFFFFFFFF
        out = None
        for shard in np.unique(shards):
            inside = shards == shard
            values = opened(int(shard))[rows[inside]]
            out = np.empty((len(documents), values.shape[1]), values.dtype) if out is None else out
            out[inside] = values
        return out

    out = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), BATCH):
        batch = pairs[start : start + BATCH]
        out[start : start + BATCH] = (signatures(batch[:, 0]) == signatures(batch[:, 1])).mean(axis=1) >= threshold
    return out


def clusters(pairs: np.ndarray) -> np.ndarray:
    """Pairs (any, 2) -> int64 (dropped, 2), ascending: each document of a cluster but the first, and that first one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return np.empty((0, 2), np.int64)
    documents, index = np.unique(pairs, return_inverse=True)
    index = index.reshape(-1, 2)
    graph = coo_array((np.ones(len(pairs), np.int32), (index[:, 0], index[:, 1])), shape=(len(documents),) * 2)
    _, label = connected_components(graph, directed=False)
    first = documents[np.unique(label, return_index=True)[1]][label]  # labels' first occurrence, in ascending documents
    dropped = documents != first
    return np.stack([documents[dropped], first[dropped]], 1)


def write_array(path: pathlib.Path, array: np.ndarray) -> None:
    with written_whole(path) as out:
        np.save(out, array)


def dropped_rows(path: pathlib.Path, shard: int) -> set[int]:
    """Of the outcome of `clusters` in a file, the rows of one shard."""
    dropped = np.load(path, mmap_mode="r")[:, 0]
    start, stop = np.searchsorted(dropped, [shard << 32, (shard + 1) << 32])
    return set((dropped[start:stop] & 0xFFFFFFFF).tolist())
