"""The quality and repetition rules of MassiveText (Rae et al., arXiv:2112.11446, appendix A.1.1 and table A1).

They were made for English. In Chinese and Japanese text a word is counted as in `words.py`, its length is not looked at,
and the stop words are Chinese ones; in languages with no list here the rule of stop words is left out.
"""

from collections import Counter

import numpy as np

from jaxlm.data.cleaning.step import STEPS, Removed
from jaxlm.data.cleaning.words import blank_words, count_han, count_words, hash_ngrams, hash_words, is_han, ngram_size, units

STOP_WORDS = {"en": {"the", "be", "to", "of", "and", "that", "have", "with"},
              "zh": set("的是不了在有和之人一")}
BULLETS = ("•", "‣", "▶", "◀", "◦", "■", "□", "▪", "▫", "–", "-", "*", "●")
ELLIPSES = ("...", "…")


@STEPS.register("quality")
def build_quality(options, context):
    """Words, their mean length, symbols, bullets, ellipses, words with letters, stop words; each bound as in the paper."""

    def step(record):
        words = blank_words(record.text)
        count, han = count_words(words), count_han(words)
        if count < options.min_words:
            return Removed("too few words", f"{count:.0f} < {options.min_words}")
        if options.max_words and count > options.max_words:
            return Removed("too many words", f"{count:.0f} > {options.max_words}")
        if 2 * han <= len(words):
            mean = (sum(map(len, words)) - han) / max(1, len(words) - han)
            if not options.min_mean_word_length <= mean <= options.max_mean_word_length:
                return Removed("mean word length", f"{mean:.1f}")
        for name, symbols in (("hash signs", record.text.count("#")),
                              ("ellipses", record.text.count("...") + record.text.count("…"))):
            if symbols > options.max_symbols_per_word * count:
                return Removed(f"too many {name}", f"{symbols / count:.2f} a word")
        lines = [line for raw in record.text.split("\n") if (line := raw.strip())]
        if (share := mean_of(line.startswith(BULLETS) for line in lines)) > options.max_bullet_lines:
            return Removed("lines with bullets", f"{share:.2f}")
        if (share := mean_of(line.endswith(ELLIPSES) for line in lines)) > options.max_ellipsis_lines:
            return Removed("lines ending in an ellipsis", f"{share:.2f}")
        if (share := mean_of(any(map(str.isalpha, word)) for word in words)) < options.min_alphabetic_words:
            return Removed("words without letters", f"{1 - share:.2f}")
        known = stop_words_of(record, 2 * han > len(words))
        if known and (found := len(known.intersection(units(record.text)))) < options.min_stop_words:
            return Removed("too few stop words", f"{found} < {options.min_stop_words}")
        return record

    return step


def mean_of(booleans) -> float:
    booleans = list(booleans)
    return sum(booleans) / max(1, len(booleans))


def stop_words_of(record, han: bool):
    """By the language where one was told, else by the script; None: no list."""
    language = record.fields["language"] if "language" in record.fields else "zh" if han else "en"
    return STOP_WORDS[language] if language in STOP_WORDS else None


@STEPS.register("repetition")
def build_repetition(options, context):
    """Shares of lines, paragraphs and characters that are said again. Lines and paragraphs count from the second time on."""

    def step(record):
        for name, separator, most, most_characters in (
                ("lines", "\n", options.max_duplicate_lines, options.max_duplicate_line_characters),
                ("paragraphs", "\n\n", options.max_duplicate_paragraphs, options.max_duplicate_paragraph_characters)):
            parts = [part for raw in record.text.split(separator) if (part := raw.strip())]
            seen = Counter(parts)
            if (share := 1 - len(seen) / max(1, len(parts))) > most:
                return Removed(f"duplicate {name}", f"{share:.2f} > {most}")
            again = sum((times - 1) * len(part) for part, times in seen.items())
            if (share := again / max(1, sum(map(len, parts)))) > most_characters:
                return Removed(f"characters in duplicate {name}", f"{share:.2f} > {most_characters}")
        words = units(record.text)
        hashes, han = hash_words(words), is_han(words)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        for n, most in zip((2, 3, 4), options.max_top_ngrams, strict=True):
            if (share := top_ngram_share(hashes, lengths, ngram_size(n, han))) > most:
                return Removed(f"characters in the most frequent {n}-gram", f"{share:.2f} > {most}")
        for n, most in zip(range(5, 11), options.max_duplicate_ngrams, strict=True):
            if (share := duplicate_ngram_share(hashes, lengths, ngram_size(n, han))) > most:
                return Removed(f"characters in duplicate {n}-grams", f"{share:.2f} > {most}")
        return record

    return step


def top_ngram_share(hashes, lengths, n: int) -> float:
    """Share of characters in the n-gram that comes most often; 0 where none comes twice. Overlapping ones count once."""
    ngrams = hash_ngrams(hashes, n)
    if not len(ngrams):
        return 0.0
    _, group, times = np.unique(ngrams, return_inverse=True, return_counts=True)
    if times.max() < 2:
        return 0.0
    tied = np.flatnonzero(times == times.max())[:8]  # of equally frequent ones, that with most characters
    return max(covered_share(group == which, lengths, n) for which in tied)


def duplicate_ngram_share(hashes, lengths, n: int) -> float:
    """Share of characters in n-grams that came before. Characters of overlapping ones count once."""
    ngrams = hash_ngrams(hashes, n)
    if not len(ngrams):
        return 0.0
    again = np.ones(len(ngrams), bool)
    again[np.unique(ngrams, return_index=True)[1]] = False
    return covered_share(again, lengths, n)


def covered_share(starts, lengths, n: int) -> float:
    """starts: of each n-gram, whether it counts (W - n + 1,). -> share of the words' characters (W,) inside one that does."""
    edges = np.zeros(len(lengths) + 1, np.int64)
    edges[: len(starts)] += starts
    edges[n : n + len(starts)] -= starts
    covered = np.cumsum(edges[:-1]) > 0
    return float(lengths[covered].sum() / max(1, lengths.sum()))
