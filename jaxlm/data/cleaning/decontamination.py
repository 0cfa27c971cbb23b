"""Decontamination: documents that hold a piece of an evaluation set are removed, and each is listed with what was found.

As GPT-3 did (Brown et al., arXiv:2005.14165, appendix C): words in lower case without punctuation, n-grams of 13 words; an
evaluation text with fewer is looked for as a whole, if it has at least `min_words`. (GPT-3 cut the piece out of the document;
here the document goes.)
"""

import json
import pathlib
from collections.abc import Iterator

import numpy as np

from jaxlm.data.cleaning.step import STEPS, Removed
from jaxlm.data.cleaning.words import hash_ngrams, hash_words, is_han, ngram_size, units
from jaxlm.data.formats import UNREADABLE, Bad, Broken, Extent, format_of
from jaxlm.data.sources import find_files, reading
from jaxlm.errors import UserError


@STEPS.register("decontaminate")
def build(options, context):
    index = np.load(pathlib.Path(context.folder, "decontaminate.npz"))
    files = json.loads(str(index["files"]))
    sizes = {int(size): (index[f"hashes{size}"], index[f"places{size}"]) for size in index["sizes"]}

    def step(record):
        words = units(record.text)
        hashes = hash_words(words)
        for size, (known, places) in sizes.items():
            ngrams = hash_ngrams(hashes, size)
            at = np.minimum(np.searchsorted(known, ngrams), len(known) - 1)
            found = np.flatnonzero(known[at] == ngrams)
            if len(found):
                file, line = places[at[found[0]]]
                separator = "" if is_han(words[found[0] : found[0] + size]) else " "
                ngram = separator.join(words[found[0] : found[0] + size])
                return Removed("overlaps an evaluation set", f"{ngram!r} is in {files[file]}:{line}")
        return record

    return step


def evaluation_files(config) -> list[str]:
    """Raises UserError for anything wrong with the step's keys."""
    options = config.prepare.decontaminate
    if not options.paths:
        raise UserError("prepare.decontaminate.paths: is empty; give the evaluation files, or leave decontaminate out of "
                        "prepare.steps")
    if not 0 < options.min_words <= options.ngram:
        raise UserError(f"prepare.decontaminate.min_words={options.min_words}: must be from 1 to prepare.decontaminate.ngram="
                        f"{options.ngram}")
    return find_files(config, options.paths, "prepare.decontaminate.paths")


def write_index(config, path: pathlib.Path) -> None:
    """The n-grams of all evaluation texts, by hash, with the line of the first text that has them."""
    options, files = config.prepare.decontaminate, evaluation_files(config)
    found = {}  # size -> ([hashes], [(file, line)])
    for number, file in enumerate(files):
        for line, text in evaluation_texts(config, file):
            words = units(text)
            han = is_han(words)
            if len(words) < ngram_size(options.min_words, han):
                continue
            size = min(len(words), ngram_size(options.ngram, han))
            ngrams = hash_ngrams(hash_words(words), size)
            hashes, places = found.setdefault(size, ([], []))
            hashes.append(ngrams)
            places.append(np.tile(np.array([number, line], np.int32), (len(ngrams), 1)))
    if not found:
        raise UserError(f"prepare.decontaminate.paths={options.paths}: no text there has {options.min_words} words")
    arrays = {}
    for size, (hashes, places) in found.items():
        arrays[f"hashes{size}"], first = np.unique(np.concatenate(hashes), return_index=True)
        arrays[f"places{size}"] = np.concatenate(places)[first]
    names = json.dumps([pathlib.Path(file).name for file in files])
    with open(path, "wb") as out:
        np.savez(out, sizes=np.array(sorted(found)), files=np.array(names), **arrays)


def evaluation_texts(config, file: str) -> Iterator[tuple[int, str]]:
    """(number, text): of a text file its lines; of records every string in them, whatever its key."""
    settings = reading(config)
    settings.data.document = "line"
    try:
        for number, item in format_of(file).read(settings, Extent(file)):
            if isinstance(item, Bad):
                raise UserError(f"{file}:{number}: {item}")
            yield from ((number, text) for text in strings(item))
    except (Broken, *UNREADABLE) as error:
        raise UserError(f"{file}: cannot be read ({error}); fetch it again") from error


def strings(value) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)
