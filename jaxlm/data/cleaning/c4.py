"""The rules of C4 (Raffel et al., JMLR 21:140, 2020, section 2.2; details as in TensorFlow Datasets' `c4_utils`), and the
same for Chinese punctuation."""

import pathlib
import re

from jaxlm.data.cleaning.step import STEPS, Removed
from jaxlm.data.cleaning.words import HAN, blank_words, count_words
from jaxlm.errors import UserError

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]", re.IGNORECASE)
ENDS = (".", "!", "?", '"', "\u201d", "。", "！", "？", "．", "」", "』")
ELLIPSES = ("...", "…")
SENTENCE = re.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)|[。！？．]+[\u201d\u2019」』]*")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@STEPS.register("c4")
def build(options, context):
    """Lines that are not prose go, then documents of which too little is left."""
    bad = bad_words(options.bad_words_file) if options.bad_words_file else None

    def keeps(line):
        lower = line.lower()
        return ((not options.terminal_punctuation or line.endswith(ENDS) and not line.endswith(ELLIPSES))
                and count_words(blank_words(line)) >= options.min_line_words
                and not (options.no_javascript and "javascript" in lower)
                and not (options.no_policy and any(words in lower for words in POLICY)))

    def step(record):
        lower = record.text.lower()
        if options.no_lorem_ipsum and "lorem ipsum" in lower:
            return Removed("lorem ipsum")
        if options.no_curly_bracket and "{" in lower:
            return Removed("curly bracket")
        if bad and (found := bad.search(lower)):
            return Removed("bad word", found[0])
        text = record.text
        while options.no_citations and CITATION.search(text):
            text = CITATION.sub("", text)
        lines = [line.strip() for line in text.split("\n")]
        text = "\n".join(line for line in lines if keeps(line))
        if not text:
            return Removed("no line of prose")
        if options.min_sentences and (found := len(SENTENCE.findall(text))) < options.min_sentences:
            return Removed("too few sentences", f"{found} < {options.min_sentences}")
        if text == record.text:
            return record
        context.counts["changed"] += 1
        return record._replace(text=text)

    return step


def bad_words(file: str) -> re.Pattern:
    """Of a file with one word or phrase a line, in any case. Chinese ones match inside running text."""
    try:
        words = [line.strip().lower() for line in pathlib.Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"prepare.c4.bad_words_file={file}: cannot be read ({error.strerror})") from error
    if not words:
        raise UserError(f"prepare.c4.bad_words_file={file}: holds no word; remove it, or set the key to ''")
    parts = [re.escape(word) if re.search(f"[{HAN}]", word) else rf"(?<!\w){re.escape(word)}(?!\w)" for word in words]
    return re.compile("|".join(parts))
