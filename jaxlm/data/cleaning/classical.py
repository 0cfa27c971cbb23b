"""For classical tasks (bag of words, topic models): text without punctuation, and without words that say little.

A language model wants both; neither step is on by default.
"""

import pathlib
import re
import unicodedata

from jaxlm.data.cleaning.step import STEPS
from jaxlm.data.cleaning.words import HAN
from jaxlm.errors import UserError

FOLDER = pathlib.Path(__file__).parent / "stop_words"


@STEPS.register("punctuation")
def build_punctuation(options, context):
    """Every character of the Unicode classes P and S becomes a blank, but an apostrophe or hyphen inside a word."""
    inside = re.compile(r"(?<=\w)['’-](?=\w)")

    def step(record):
        kept = {match.start() for match in inside.finditer(record.text)} if options.keep_inside_words else ()
        text = "".join(c if i in kept or unicodedata.category(c)[0] not in "PS" else " " for i, c in enumerate(record.text))
        return changed(record, text, context)

    return step


@STEPS.register("stop_words")
def build_stop_words(options, context):
    """Removes the words of the lists of `languages`, and those of `file`, one a line.

    Chinese is not cut into words here: there a listed word goes wherever its characters stand, 的 out of 目的 too. Where
    that matters, cut the text into words first, with blanks between, and set `whole_words`.
    """
    words = [word for language in options.languages for word in read_list(FOLDER / f"{language}.txt")]
    words += read_list(pathlib.Path(options.file)) if options.file else []
    words = sorted(set(words), key=lambda word: (-len(word), word))
    han = [re.escape(word) for word in words if re.search(f"[{HAN}]", word)]
    other = [re.escape(word) for word in words if not re.search(f"[{HAN}]", word)]
    patterns = [rf"(?<![\w'’])(?:{'|'.join(other)})(?![\w'’])"] if other else []
    patterns += ([rf"(?<!\w)(?:{'|'.join(han)})(?!\w)"] if options.whole_words else han) if han else []
    pattern = re.compile("|".join(patterns) or r"(?!)", re.IGNORECASE)

    def step(record):
        text, before = record.text, None
        while text != before:  # what a removed word stood between may make another
            before, text = text, pattern.sub("", text)
        return changed(record, text, context)

    return step


def read_list(file: pathlib.Path) -> list[str]:
    if not file.is_file():
        there = ", ".join(sorted(f.stem for f in FOLDER.glob("*.txt")))
        raise UserError(f"prepare.stop_words: no list {file}; there are {there}, and prepare.stop_words.file")
    return [word.strip() for word in file.read_text(encoding="utf-8").splitlines() if word.strip() and word[0] != "#"]


def changed(record, text: str, context):
    if text == record.text:
        return record
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    context.counts["changed"] += 1
    return record._replace(text=text)
