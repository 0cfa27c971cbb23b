"""Length: documents too short to teach anything, and too long to be one document."""

from jaxlm.data.cleaning.step import STEPS, Removed
from jaxlm.data.cleaning.words import blank_words, count_words


@STEPS.register("length")
def build(options, context):
    """Characters, words and characters in a line, each between its two keys; 0 is no bound."""

    def step(record):
        text = record.text.strip()
        if not text:
            return Removed("empty")
        measures = {"characters": (len(text), options.min_characters, options.max_characters)}
        if options.min_words or options.max_words:
            measures["words"] = (count_words(blank_words(text)), options.min_words, options.max_words)
        if options.max_line_characters:
            measures["characters in a line"] = (max(map(len, text.split("\n"))), 0, options.max_line_characters)
        for name, (value, least, most) in measures.items():
            if value < least:
                return Removed(f"too few {name}", f"{value:.0f} < {least}")
            if most and value > most:
                return Removed(f"too many {name}", f"{value:.0f} > {most}")
        return record

    return step
