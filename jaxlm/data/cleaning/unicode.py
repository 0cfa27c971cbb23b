"""Unicode: wrongly decoded text repaired, one form for each character, and no characters that nobody sees."""

import re
import unicodedata

from jaxlm.data.cleaning.step import STEPS, needed
from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean

# Soft hyphen, zero-width blank and joiner of words, marks of direction, byte-order mark, annotation, private use, and half
# characters. Kept: U+200C and U+200D, which change what is written in Persian, Indic scripts and emoji.
INVISIBLE = re.compile("[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
                       "\ufff9-\ufffb\ufffe\uffff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
BLANKS = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")  # not the tab and the ideographic one: they lay text out
LINE_END = re.compile("\r\n|[\r\x85\u2028\u2029\x0b\x0c]")
EMPTY_LINES = re.compile("\n{3,}")


@STEPS.register("unicode")
def build(options, context):
    """`form`: NFC keeps what the eye sees; NFKC also makes one of full and half width, ligatures, powers; none.
    `repair`: mojibake, by ftfy (Speer, doi:10.5281/zenodo.2591652). Its other opinions are off: it would straighten quotes,
    and turn the full-width punctuation of Chinese into ASCII."""
    if options.form not in (forms := ("NFC", "NFKC", "none")):
        raise UserError(f"prepare.unicode.form={options.form!r}: {did_you_mean(options.form, forms)}")
    repair = lambda text: text
    if options.repair:
        ftfy = needed("ftfy", "unicode")
        config = ftfy.TextFixerConfig(unescape_html=False, uncurl_quotes=False, fix_character_width=False,
                                      fix_latin_ligatures=False, normalization=None, explain=False)
        repair = lambda text: ftfy.fix_text(text, config)

    def step(record):
        text = repair(record.text)
        if options.form != "none":
            text = unicodedata.normalize(options.form, text)
        if options.remove_invisible:
            text = INVISIBLE.sub("", CONTROL.sub("", LINE_END.sub("\n", text)))
            if options.form != "none":  # what stood apart may now stand together
                text = unicodedata.normalize(options.form, text)
        if options.tidy_blanks:
            text = "\n".join(line.rstrip() for line in BLANKS.sub(" ", text).split("\n"))
            text = EMPTY_LINES.sub("\n\n", text).strip("\n")
        if text == record.text:
            return record
        context.counts["changed"] += 1
        return record._replace(text=text)

    return step
