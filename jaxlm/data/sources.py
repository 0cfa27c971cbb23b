"""Sources: files, folders, globs and URLs -> documents. What the bytes of a file mean, `jaxlm.data.formats` knows."""

import glob
import json
import os
import pathlib
import types
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.data.formats import UNREADABLE, Bad, Broken, Extent, format_of, lines_before, optional
from jaxlm.errors import UserError

SHAKESPEARE = pathlib.Path(__file__).parent / "shakespeare" / "input.txt"
# The keys of config.data that decide what a file's documents are.
READING = ("document", "text_field", "errors", "on_error", "header", "array_record")
# Those that say how an example is made of a record, where data.form is not "text".
EXAMPLE = ("form", "parallel", "prompt", "target", "label_field", "classes", "tokenizer")


class Record(NamedTuple):
    """One document of a source."""

    text: str
    fields: dict  # what the source has of it beside the text: {"url": ..., ...}
    where: str  # for messages: "file:line", or "file" where the whole file is the document


class Skipped:
    """Records left out by data.on_error=skip: how many, and what was wrong with the first ones."""

    def __init__(self, count: int = 0, first=()):
        self.count, self.first = count, list(first)

    def add(self, problem: str, count: int = 1) -> None:
        self.count += count
        self.first = [*self.first, problem][:20]


def reading(config) -> types.SimpleNamespace:
    """Of a config what the functions here and `jaxlm.data.examples` look at: small, and it can be sent to another process."""
    return types.SimpleNamespace(data=types.SimpleNamespace(**{key: getattr(config.data, key) for key in (*READING, *EXAMPLE)}))


def told(config) -> dict:
    """Of `reading` what the tokens depend on. The tokenizer itself is told of by its contents."""
    left_out = EXAMPLE if config.data.form == "text" else ("tokenizer",)
    return {key: value for key, value in vars(reading(config).data).items() if key not in left_out}


# ---- Files -----------------------------------------------------------------------------------------------------------------


def find_files(config, paths: str, key: str) -> list[str]:
    """ "a.txt,b/*.jsonl,gs://c/d.parquet,saved_dataset" -> the files, sorted within each glob; with data.parallel all of "train"
    that there are: train.de, train.en. Raises UserError for what is missing or empty."""
    files, problems = [], []
    for part in (part.strip() for part in paths.split(",")):
        if part == "shakespeare":
            files.append(str(SHAKESPEARE))
            continue
        part = part if "://" in part else os.path.join(config.data.root, part)
        find = find_remote if "://" in part else find_local
        endings = [*(f".{ending}" for ending in config.data.parallel), ""]
        found = {file: size for ending in endings for file, size in find(part + ending).items()}
        if not found:
            problems.append(f"{key}={part}: no such file; give a text, jsonl or other file (relative to data.root)")
        found |= {index: os.path.getsize(index) for file in found if file.endswith(".bin") and "://" not in file
                  and os.path.isfile(index := file.removesuffix(".bin") + ".idx")}  # Megatron's pair
        problems += [f"{key}: {file} is empty; remove it from the list" for file, size in found.items() if size == 0][:1]
        files += found
    if problems:
        raise UserError(*problems)
    return files


def find_all(config, asked: dict[str, str]) -> list[list[str]]:
    """`find_files` of each {key: paths}; what is wrong with any of them is raised together."""
    found, problems = [], []
    for key, paths in asked.items():
        try:
            found.append(find_files(config, paths, key))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return found


def find_local(part: str) -> dict[str, int]:
    """{file: bytes}"""
    if os.path.isdir(part):
        return {file: os.path.getsize(file) for file in saved_dataset(part)}
    found = sorted(glob.glob(part, recursive=True)) if glob.has_magic(part) else [part]
    return {file: os.path.getsize(file) for file in found if os.path.isfile(file)}


def find_remote(part: str) -> dict[str, int]:
    optional("fsspec", part.partition("://")[0] + "://")
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(part)
        found = sorted(system.glob(path)) if glob.has_magic(path) else [path]
        infos = {system.unstrip_protocol(file): system.info(file) for file in found if system.isfile(file)}
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"data.path={part}: cannot be looked up ({error}); check the address, and install what its protocol "
                        "needs") from error
    return {file: info["size"] or 0 for file, info in infos.items()}


def saved_dataset(folder: str) -> list[str]:
    """The files of what Hugging Face's `Dataset.save_to_disk` wrote."""
    state, splits = os.path.join(folder, "state.json"), os.path.join(folder, "dataset_dict.json")
    try:
        if os.path.isfile(splits):
            names = json.loads(pathlib.Path(splits).read_text())["splits"]
            raise UserError(f"data.path={folder}: holds the splits {', '.join(names)}; give one, such as {folder}/{names[0]}")
        if not os.path.isfile(state):
            raise UserError(f"data.path={folder}: a folder, but not a saved dataset; give its files: {folder}/*.jsonl")
        stored = json.loads(pathlib.Path(state).read_text())
        if "_indices_data_files" in stored and stored["_indices_data_files"]:
            raise UserError(f"data.path={folder}: saved with an index over its rows; save dataset.flatten_indices()")
        return [os.path.join(folder, file["filename"]) for file in stored["_data_files"]]
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(f"data.path={folder}: not a whole saved dataset ({error!r}); save it again") from error


# ---- Documents -------------------------------------------------------------------------------------------------------------


def read_records(config, files: list[str], skipped: Skipped | None = None) -> Iterator[Record]:
    """One document at a time: a whole text file, a line of it, or a record, by `config.data.document` and the file's format.

    skipped: counts what data.on_error=skip leaves out. Raises UserError: a record or file that cannot be read (file, line,
    remedy).
    """
    for file in files:
        for number, text, fields in read_extent(config, Extent(file), Skipped() if skipped is None else skipped):
            yield Record(text, fields, file if number is None else f"{file}:{number}")


def whole_files(config, files: list[str]) -> list[Extent]:
    """All of each; of those that are read together (data.parallel), by the first."""
    others = tuple(f".{ending}" for ending in config.data.parallel[1:])
    return [Extent(file) for file in files if not file.endswith(others)]


def read_texts(config, extents, skipped: Skipped) -> Iterator[str]:
    """The documents of parts of files."""
    for extent in extents:
        for _, text, _ in read_extent(config, extent, skipped):
            yield text


def read_extent(config, extent: Extent, skipped: Skipped) -> Iterator[tuple[int | None, str, dict]]:
    """(number, text, other fields) of each document; lines are numbered from the extent's start."""
    field = config.data.text_field

    def text_of(item):
        if isinstance(item, str):
            return item, {}
        if field not in item or not isinstance(item[field], str):
            raise Unfit(f"no text in field {field!r} (it has: {', '.join(item)}); set data.text_field, or data.on_error=skip")
        return item.pop(field), item

    for number, (text, fields) in read_items(config, extent, skipped, text_of):
        yield number, text, fields


class Unfit(Exception):
    """A record is not what it is read for."""


def read_items(config, extent: Extent, skipped: Skipped, take) -> Iterator[tuple[int | None, object]]:
    """(number, what `take` makes of it) of each record: a string or a dict of fields. take may raise `Unfit`."""
    kind = format_of(extent.file, config.data.parallel)

    def refuse(number, problem):
        if number is None:
            where = extent.file
        else:
            where = f"{extent.file}:{number + (lines_before(extent) if kind.numbers == 'lines' else 0)}"
        if config.data.on_error == "stop":
            raise UserError(f"{where}: {problem}")
        skipped.add(f"{where}: {problem}")

    try:
        for number, item in kind.read(config, extent):
            if isinstance(item, Bad):
                refuse(number, item)
                continue
            try:
                taken = take(item)
            except Unfit as problem:
                refuse(number, problem)
            else:
                yield number, taken
    except Broken as error:
        refuse(None, f"{error}; fetch it again, or set data.on_error=skip for what was read before")
    except UNREADABLE as error:
        what = "is damaged or cut short" if isinstance(error, EOFError) or extent.file.endswith((".gz", ".zst")) else \
            "cannot be read"
        refuse(None, f"{what} ({error}); fetch it again, or set data.on_error=skip for what was read before")
