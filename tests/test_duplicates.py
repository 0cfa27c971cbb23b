"""Which documents are duplicates, against Jaccard similarities that are known by construction and against all pairs."""

import itertools

import numpy as np
import pytest

from configs import default
from jaxlm.data.cleaning import matching
from jaxlm.data.cleaning.duplicates import build_exact, build_near
from jaxlm.data.cleaning.shards import SketchWriter


def near(**options):
    config = default.get_config().prepare.near_duplicates
    config.update(options)
    return build_near(config)


def write_sketches(folder, sketcher, texts, shard_size):
    """-> paths of the sketches of shards of `shard_size` texts."""
    paths = []
    for number, start in enumerate(range(0, len(texts), shard_size)):
        writer = SketchWriter()
        for text in texts[start : start + shard_size]:
            writer.add(*sketcher.sketch(text))
        paths.append(folder / f"{number}.jsonl.zst")
        writer.write(paths[-1])
    return paths


def dropped(folder, sketcher, texts, shard_size=7):
    """-> {number of a dropped text: number of the one kept}."""
    paths = write_sketches(folder, sketcher, texts, shard_size)
    pairs = [matching.match(paths, sketcher.threshold, *part) for part in matching.parts_of(sketcher.num_keys, len(texts))]
    number = lambda document: int(document >> 32) * shard_size + int(document & 0xFFFFFFFF)
    return {number(a): number(b) for a, b in matching.clusters(np.concatenate(pairs))}


def pair_of_texts(jaccard, rng, size=400):
    """Two texts whose sets of words have this Jaccard similarity: 2 sets of `size` share 2 J size / (1 + J) words."""
    shared = round(2 * jaccard * size / (1 + jaccard))
    words = [f"w{rng.integers(2**62)}" for _ in range(2 * size - shared)]
    return " ".join(words[:size]), " ".join(words[size - shared :])


@pytest.mark.parametrize("jaccard, least, most", [(0.95, 1.0, 1.0), (0.9, 0.97, 1.0), (0.7, 0.0, 0.06), (0.6, 0.0, 0.0),
                                                  (0.3, 0.0, 0.0)])
def test_near_duplicates_of_known_jaccard(tmp_path, jaccard, least, most):
    """Threshold 0.8, 120 hashes: at J = 0.9 the estimate falls short with probability below 0.1 %; at 0.7, whose standard
    error is 0.042, it passes with probability 1 %; at 0.6 with 4e-6."""
    rng, sketcher, pairs = np.random.default_rng(0), near(shingle=1), 100
    texts = [text for _ in range(pairs) for text in pair_of_texts(jaccard, rng)]
    found = dropped(tmp_path, sketcher, texts)
    assert all(later == kept + 1 and kept % 2 == 0 for later, kept in found.items())  # only the pair itself, the first kept
    assert least * pairs <= len(found) <= most * pairs


def test_signatures_estimate_jaccard_without_bias():
    rng, sketcher = np.random.default_rng(1), near(shingle=1)
    for jaccard in (0.2, 0.5, 0.8):
        pairs = [[sketcher.sketch(text)[1] for text in pair_of_texts(jaccard, rng)] for _ in range(60)]
        estimates = [np.mean(a == b) for a, b in pairs]
        assert abs(np.mean(estimates) - jaccard) < 4 * np.sqrt(jaccard * (1 - jaccard) / 120 / 60)


def test_shingles_of_words_and_of_chinese_characters(tmp_path):
    """A changed word touches 5 of the 60 - 4 shingles: J = 51/61; of Chinese, a character touches 8 of 60 - 7: J = 45/61."""
    rng = np.random.default_rng(2)
    english = [f"w{i}" for i in rng.permutation(60)]
    chinese = [chr(0x4E00 + i) for i in rng.permutation(2000)[:60]]
    changed = lambda words, new: [*words[:30], new, *words[31:]]
    texts = [" ".join(english), " ".join(changed(english, "new")), "".join(chinese), "".join(changed(chinese, "龘"))]
    assert dropped(tmp_path, near(threshold=0.6), texts) == {1: 0, 3: 2}
    assert dropped(tmp_path, near(threshold=0.95), texts) == {}


def test_texts_shorter_than_a_shingle_or_without_words(tmp_path):
    texts = ["one two", "one two", "one three", "...", "...", "!!!", "", ""]
    assert dropped(tmp_path, near(), texts) == {1: 0, 4: 3, 7: 6}


def test_exact_duplicates(tmp_path):
    options = default.get_config().prepare.exact_duplicates
    texts = ["The cat, sat.", "the  cat sat", "The cat sits", "ＴＨＥ cat sat!", "The cat, sat.", "...", "!!"]
    assert dropped(tmp_path, build_exact(options), texts, shard_size=2) == {1: 0, 3: 0, 4: 0}
    options.normalize = False
    assert dropped(tmp_path, build_exact(options), texts, shard_size=2) == {4: 0}


def clusters_by_all_pairs(sketcher, texts):
    """By definition: texts in one cluster that are joined by pairs which share a bucket and are alike; the first is kept."""
    sketches = [sketcher.sketch(text) for text in texts]
    first = list(range(len(texts)))
    for a, b in itertools.combinations(range(len(texts)), 2):
        if (sketches[a][0] == sketches[b][0]).any() and np.mean(sketches[a][1] == sketches[b][1]) >= sketcher.threshold:
            x, y = sorted((first[a], first[b]))
            first = [x if f == y else f for f in first]
    return {i: f for i, f in enumerate(first) if f != i}


@pytest.mark.parametrize("seed", range(4))
def test_matching_equals_all_pairs(tmp_path, seed, monkeypatch):
    """Families of texts with chains and hubs. Leaders instead of all pairs may leave a chain in two, but never leaves two
    documents apart that one bucket shows to be alike to its leader; here families are tight, and both agree."""
    rng, texts = np.random.default_rng(seed), []
    for _ in range(12):
        base = [f"w{rng.integers(2**40)}" for _ in range(100)]
        for _ in range(rng.integers(1, 6)):
            copy = list(base)
            for place in rng.integers(0, 100, rng.integers(0, 4)):
                copy[place] = f"n{rng.integers(2**40)}"
            texts.append(" ".join(copy))
    texts = [texts[i] for i in rng.permutation(len(texts))]
    sketcher = near(shingle=1)
    expected = clusters_by_all_pairs(sketcher, texts)
    assert len(expected) > 10
    assert dropped(tmp_path, sketcher, texts) == expected
    monkeypatch.setattr(matching, "PART_ENTRIES", 5)  # keys in many parts
    monkeypatch.setattr(matching, "BATCH", 3)
    assert dropped(tmp_path, sketcher, texts, shard_size=3) == expected


@pytest.mark.parametrize("seed", range(4))
def test_what_is_kept_holds_no_duplicates(tmp_path, seed):
    """Loose families, in which being alike is no equivalence: chains. A second pass finds nothing more to drop."""
    rng, texts = np.random.default_rng(seed), []
    for _ in range(8):
        words = [f"w{rng.integers(2**40)}" for _ in range(100)]
        for _ in range(8):
            words = [*words[rng.integers(1, 8) :], *(f"w{rng.integers(2**40)}" for _ in range(5))]
            texts.append(" ".join(words))
    texts = [texts[i] for i in rng.permutation(len(texts))]
    sketcher = near(shingle=1, threshold=0.75)
    gone = dropped(tmp_path, sketcher, texts)
    assert len(gone) > 20 and all(kept not in gone for kept in gone.values())
    assert dropped(tmp_path, sketcher, [text for i, text in enumerate(texts) if i not in gone]) == {}


def test_a_bucket_with_many_different_documents(tmp_path):
    """All share a bucket (one band of one row), none is like another but the last two."""
    sketcher = near(bands=1, rows=1, shingle=1, threshold=1.0)
    keys, signature = np.zeros(1, np.uint64), lambda i: np.array([i, i], np.uint32)
    writer = SketchWriter()
    for i in [*range(50), 49]:
        writer.add(keys, signature(i))
    writer.write(tmp_path / "0.jsonl.zst")
    assert sketcher.num_keys == 1
    assert matching.match([tmp_path / "0.jsonl.zst"], 1.0, 0, 0, 1).tolist() == [[50, 49]]
