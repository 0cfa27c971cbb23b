"""Words of any script, and hashes of runs of them.

Chinese and Japanese are written without blanks. Each of their characters is a unit here, and where the rules of the papers
count words, CHARACTERS_PER_WORD characters count as one: a count of words is scaled down, the length of an n-gram up.
"""

import hashlib
import math
import re
import unicodedata

import numpy as np

HAN = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"  # and kana
HAN_PUNCTUATION = "\u3000-\u3004\u3006\u3008-\u303f\ufe30-\ufe4f\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uffef"
CHARACTERS_PER_WORD = 1.5

UNIT = re.compile(rf"[{HAN}]|[^\W_{HAN}]+(?:['’][^\W_{HAN}]+)*")
BLANK_WORD = re.compile(rf"[{HAN}]|[^\s{HAN}{HAN_PUNCTUATION}]+")
IS_HAN = re.compile(f"[{HAN}]")


def units(text: str) -> list[str]:
    """Words without punctuation, in lower case; of Chinese and Japanese, characters."""
    return UNIT.findall(text.lower())


def normalized(text: str) -> str:
    """What is left of a text when case, punctuation and white space do not matter."""
    return " ".join(units(unicodedata.normalize("NFKC", text)))


def blank_words(text: str) -> list[str]:
    """Words as blanks cut them, punctuation and all; of Chinese and Japanese, characters."""
    return BLANK_WORD.findall(text)


def count_words(words: list[str]) -> float:
    han = count_han(words)
    return len(words) - han + han / CHARACTERS_PER_WORD


def count_han(words: list[str]) -> int:
    return sum(len(word) == 1 and bool(IS_HAN.match(word)) for word in words)


def is_han(words: list[str]) -> bool:
    """Whether most of them are Chinese or Japanese characters."""
    return 2 * count_han(words) > len(words)


def ngram_size(n: int, han: bool) -> int:
    """Units of an n-gram of n words."""
    return math.ceil(n * CHARACTERS_PER_WORD) if han else n


class WordHashes(dict):
    """Word -> 64 bits, the same on every machine."""

    def __missing__(self, word: str) -> int:
        value = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        if len(self) < 2**20:  # a bound on memory; later words are hashed each time
            self[word] = value
        return value


WORD_HASHES = WordHashes()


def hash_words(words: list[str]) -> np.ndarray:
    """-> uint64 (len(words),)."""
    return np.fromiter(map(WORD_HASHES.__getitem__, words), np.uint64, len(words))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Hashes of words (W,) -> of its n-grams (max(0, W - n + 1),): a polynomial, mixed so that all its bits are used."""
    if len(hashes) < n:
        return np.empty(0, np.uint64)
    out = np.zeros(len(hashes) - n + 1, np.uint64)
    for i in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(out)]
    return mix(out)


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of 64 bits in which each bit depends on each."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
