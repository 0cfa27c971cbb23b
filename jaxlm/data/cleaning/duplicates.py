"""Duplicates: of documents that are the same, or nearly, the first is kept.

Each document is sketched by itself: some bucket keys, and a signature. Documents that share a bucket are compared by their
signatures; what is similar enough, perhaps by way of others, is one cluster, and the first document of a cluster stays
(`matching.py`). So the outcome depends on the documents and their order alone.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from jaxlm.data.cleaning.step import CORPUS_STEPS
from jaxlm.data.cleaning.words import hash_ngrams, hash_words, is_han, mix, ngram_size, normalized
from jaxlm.errors import UserError


class Sketcher(NamedTuple):
    """num_keys: buckets of a document. threshold: share of equal entries of two signatures from which they are duplicates.
    sketch: text -> (keys uint64 (num_keys,), signature (any,))."""

    num_keys: int
    threshold: float
    sketch: object


@CORPUS_STEPS.register("exact_duplicates")
def build_exact(options) -> Sketcher:
    """By a hash of 128 bits: half of it is the bucket, half the signature. `normalize`: case, punctuation and white space do
    not count."""

    def sketch(text):
        text = (normalized(text) or text) if options.normalize else text
        digest = np.frombuffer(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "<u8")
        return digest[:1], digest[1:]

    return Sketcher(1, 1.0, sketch)


@CORPUS_STEPS.register("near_duplicates")
def build_near(options) -> Sketcher:
    """MinHash with banding (Broder, 1997; Leskovec et al., Mining of Massive Datasets, 3.4) over shingles of `shingle` words.

    Two documents with Jaccard similarity J meet in a bucket with probability 1 - (1 - J^rows)^bands, and then are compared by
    the estimate of J from bands * rows hashes, whose standard error is sqrt(J (1 - J) / (bands * rows)).
    """
    bands, rows = options.bands, options.rows
    if problems := [f"prepare.near_duplicates.{key}={options[key]}: must be at least 1"
                    for key in ("bands", "rows", "shingle") if options[key] < 1]:
        raise UserError(*problems)
    if not 0 < options.threshold <= 1:
        raise UserError(f"prepare.near_duplicates.threshold={options.threshold}: must be above 0, and at most 1")
    constants = np.frombuffer(hashlib.shake_256(b"jaxlm minhash").digest(16 * bands * rows), "<u8").reshape(2, -1)
    multipliers, offsets = constants[0] | np.uint64(1), constants[1]

    def sketch(text):
        signature = minhash(shingles(text, options.shingle), multipliers, offsets)
        keys = np.arange(bands, dtype=np.uint64)
        for column in signature.reshape(bands, rows).T:
            keys = mix(keys * np.uint64(0x9E3779B97F4A7C15) + column)
        return keys, signature

    return Sketcher(bands, options.threshold, sketch)


def shingles(text: str, n: int) -> np.ndarray:
    """Hashes of the different runs of n words; of a shorter text, of all its words; of one without words, of itself."""
    words = normalized(text).split(" ") if text else []
    words = words if words and words[0] else [text]
    n = min(ngram_size(n, is_han(words)), len(words))
    return np.unique(hash_ngrams(hash_words(words), n))


def minhash(values: np.ndarray, multipliers, offsets, block: int = 2048) -> np.ndarray:
    """Least value of each hash function over a set of uint64 -> uint32 (functions,). Multiply-add-shift (Dietzfelbinger)."""
    least = np.full(len(multipliers), 0xFFFFFFFF, np.uint32)
    for start in range(0, len(values), block):
        hashed = values[start : start + block, None] * multipliers + offsets
        least = np.minimum(least, (hashed >> np.uint64(32)).min(axis=0).astype(np.uint32))
    return least
