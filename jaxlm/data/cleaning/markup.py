"""HTML: the text of a page without its markup, menus, footers and scripts."""

import html
import re

from jaxlm.data.cleaning.step import STEPS, Removed, needed

NAMES = ("a|abbr|address|article|aside|b|base|blockquote|body|br|button|canvas|caption|center|cite|code|col|colgroup|dd|del|"
         "details|dialog|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|frame|frameset|h[1-6]|head|header|hr|"
         "html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|map|mark|menu|meta|nav|noscript|object|ol|optgroup|option|"
         "p|param|picture|pre|q|s|samp|script|section|select|small|source|span|strike|strong|style|sub|summary|sup|svg|table|"
         "tbody|td|template|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr")
TAG = re.compile(rf"<(?=/?(?:{NAMES})(?:\s[^<>]*)?/?>|!doctype\b|!--)", re.IGNORECASE)
PAGE = re.compile(r"<(?:!doctype|html|body)\b", re.IGNORECASE)
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


@STEPS.register("html")
def build(options, context):
    """Touches only documents with tags or entities in them. Pages go through resiliparse (Bevendorff et al., 2018; the
    extractor of DCLM, arXiv:2406.11794); `main_content` leaves out navigation and other boilerplate of whole pages.

    Markup that a page wrote to be seen (&lt;p&gt;) stays escaped, so that cleaning again finds nothing to strip.
    """
    extract_plain_text = needed("resiliparse.extract.html2text", "html").extract_plain_text

    def step(record):
        text = record.text
        tags = TAG.search(text)
        if not tags and not ENTITY.search(text):
            return record
        if tags:
            page = bool(PAGE.search(text))
            text = extract_plain_text(text, main_content=options.main_content and page, alt_texts=False)
            if not text.strip():
                return Removed("no text in markup")
        text = unescape(text)
        if text == record.text:
            return record
        context.counts["changed"] += 1
        return record._replace(text=text)

    return step


def unescape(text: str) -> str:
    """Entities -> characters, until none is left; a tag stays, or becomes, escaped."""
    text = TAG.sub("&lt;", text)
    while True:
        before = text
        text = TAG.sub("&lt;", ENTITY.sub(lambda m: html.unescape(m[0]), text))
        if text == before:
            return text
