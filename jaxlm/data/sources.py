"""Text files -> documents (strings). Where the validation split comes from is decided here too."""

import glob
import json
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.errors import UserError

SHAKESPEARE = pathlib.Path(__file__).parent / "shakespeare" / "input.txt"


class Record(NamedTuple):
    """One document of a source."""

    text: str
    fields: dict  # what the source has of it beside the text: {"url": ..., ...}
    where: str  # for messages: "file:line", or "file" where the whole file is the document


def find_files(config, paths: str, key: str) -> list[str]:
    """ "a.txt,b/*.jsonl" -> the files, sorted within each glob. Raises UserError for what is missing or empty."""
    files, problems = [], []
    for part in paths.split(","):
        part = part.strip()
        if part == "shakespeare":
            files.append(str(SHAKESPEARE))
            continue
        part = os.path.join(config.data.root, part)
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if not found or not all(os.path.isfile(f) for f in found):
            problems.append(f"{key}={part}: no such file; give a text or jsonl file (relative to data.root)")
        elif empty := [f for f in found if os.path.getsize(f) == 0]:
            problems.append(f"{key}: {empty[0]} is empty; remove it from the list")
        files += found
    if problems:
        raise UserError(*problems)
    return files


def read_documents(config, files: list[str]) -> Iterator[str]:
    return (record.text for record in read_records(config, files))


def read_records(config, files: list[str]) -> Iterator[Record]:
    """One document at a time: a whole text file, a line of it, or a jsonl record, by `config.data.document`."""
    by_line, field = config.data.document == "line", config.data.text_field
    for file in files:
        if file.endswith(".jsonl"):
            for number, line in enumerate(read_lines(config, file), 1):
                record = parse_record(line, f"{file}:{number}", field)
                yield Record(record.pop(field), record, f"{file}:{number}")
        elif by_line:
            for number, line in enumerate(read_lines(config, file), 1):
                if line := line.rstrip("\n"):
                    yield Record(line, {}, f"{file}:{number}")
        else:
            with open(file, "rb") as source:
                yield Record(decode(source.read(), config, file, 0), {}, file)


def read_lines(config, file: str) -> Iterator[str]:
    offset = 0
    with open(file, "rb") as source:
        for line in source:
            if line.strip():
                yield decode(line, config, file, offset)
            offset += len(line)


def decode(raw: bytes, config, file: str, offset: int) -> str:
    try:
        return raw.decode("utf-8", errors=config.data.errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: invalid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); mend the "
                        "file, or set data.errors=replace") from error


def parse_record(line: str, where: str, field: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); each line of a .jsonl file is one object") from error
    if not isinstance(record, dict) or not isinstance(record[field] if field in record else None, str):
        keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where}: no text in field {field!r} (it has: {keys}); set data.text_field")
    return record


def read_splits(config) -> dict[str, list[str]]:
    """{"train": documents, "valid": documents}: valid is data.valid_path, or the last data.valid_fraction: of the
    documents where there are several, of the characters where there is one (as nanoGPT cuts Shakespeare)."""
    documents = list(read_documents(config, find_files(config, config.data.path, "data.path")))
    if not sum(map(len, documents)):
        raise UserError(f"data.path={config.data.path}: holds no text; give a file with text")
    if config.data.valid_path:
        files = find_files(config, config.data.valid_path, "data.valid_path")
        return {"train": documents, "valid": list(read_documents(config, files))}
    keep = 1 - config.data.valid_fraction
    if len(documents) > 1:
        cut = min(len(documents) - 1, max(1, int(keep * len(documents))))
        return {"train": documents[:cut], "valid": documents[cut:]}
    cut = int(keep * len(documents[0]))
    return {"train": [documents[0][:cut]], "valid": [documents[0][cut:]]}
