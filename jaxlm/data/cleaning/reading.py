"""The first stage: sources of any format, cut into documents and written as shards of about equal size."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from jaxlm.data.cleaning.shards import line_writer
from jaxlm.data.formats import UNREADABLE, Broken, Extent, format_of, lines_before, open_binary
from jaxlm.data.sources import Record, Skipped, read_extent


def group(config, files: list[str]) -> list[list[Extent]]:
    """Parts of large files, and small files together, of about `prepare.shard_characters` bytes; by sizes alone."""
    about, groups, room = config.prepare.shard_characters, [], 0
    for file in files:
        with open_binary(file) as source:
            size = source.seek(0, os.SEEK_END)
        try:
            extents = format_of(file).cut(config, file, size, about)
        except (Broken, *UNREADABLE):  # reading tells what is wrong, or counts it
            extents = [Extent(file, 0, None, size)]
        for extent in extents:
            if not groups or extent.size > room:
                groups.append([])
                room = about
            groups[-1].append(extent)
            room -= extent.size
    return groups


def read_sources(job, number: int, extents: list[Extent]) -> dict:
    """Shards of at least `prepare.shard_characters` (the last of a group may be smaller)."""
    config, shards, sources, lengths, skipped = job.config, [], defaultdict(Counter), Counter(), Skipped()
    records = documents(config, extents, skipped)
    record = next(records, None)
    while record is not None:
        name, characters = f"read/{number:06d}-{len(shards):06d}.jsonl.zst", 0
        with line_writer(job.path(name)) as write:
            while record is not None and characters < config.prepare.shard_characters:
                text, fields, where = record
                write([text, {"source": where, **fields}, where])  # an earlier cleaning may have told the source already
                characters += len(text)
                sources[file_of(where)].update(documents=1, characters=len(text))
                lengths[len(text).bit_length()] += 1
                record = next(records, None)
        shards.append(name)
    return {"shards": shards, "documents": sum(c["documents"] for c in sources.values()), "sources": sources,
            "lengths": lengths, "skipped": {"count": skipped.count, "first": skipped.first}}


def documents(config, extents: list[Extent], skipped: Skipped) -> Iterator[Record]:
    """Where `prepare.split_at` matches in a document, a new one begins."""
    split = re.compile(config.prepare.split_at, re.MULTILINE) if config.prepare.split_at else None
    for extent in extents:
        extent = Extent(*extent)
        before = lines_before(extent) if format_of(extent.file).numbers == "lines" else 0
        name = name_of(config, extent.file)
        for number, text, fields in read_extent(config, extent, skipped):
            where = name if number is None else f"{name}:{number + before}"
            starts = [match.start() for match in split.finditer(text)] if split else []
            cuts = sorted({0, *starts, len(text)})
            if len(cuts) <= 2:
                yield Record(text, fields, where)
                continue
            for piece, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False), 1):
                yield Record(text[start:stop], fields, f"{where}#{piece}")


def name_of(config, file: str) -> str:
    """A source's name as the outcome tells it: relative to data.root, so that it is the same on every machine."""
    return file.removeprefix(os.path.join(config.data.root, "") if config.data.root else "")


def file_of(where: str) -> str:
    """Of "file:line#piece"."""
    return re.sub(r"(:\d+)?(#\d+)?$", "", where)
