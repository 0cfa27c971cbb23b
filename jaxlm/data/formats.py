"""File formats: bytes -> records. Each is registered by the ending of its files, which .gz or .zst may follow.

A format reads an `Extent` and yields (number, item): the number of the line or record, from 1 (None: the whole file), and the
text, a dict of fields, or a `Bad` one. What cannot be read on at all raises `Broken`.
"""

import csv
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.registry import Registry

FORMATS = Registry("format", key="data.path")
CHUNK = 2**20
COMPRESSED = (".gz", ".zst")


class Extent(NamedTuple):
    """A part of a file that can be read by itself: from `start` to `stop` in what its format counts (bytes, row groups,
    records); stop None: to the end. size: about how many bytes of the file that is."""

    file: str
    start: int = 0
    stop: int | None = None
    size: int = 0


class Bad(str):
    """What is wrong with one record."""


class Broken(Exception):
    """The file cannot be read on from here."""


def format_of(file: str, parallel=()):
    """By the ending; text where there is none of ours. parallel: data.parallel."""
    if any(file.endswith(f".{ending}") for ending in parallel):
        return Parallel
    name = file.removesuffix(".gz").removesuffix(".zst")
    return FORMATS[next((ending for ending in FORMATS if name.endswith(ending)), ".txt")]


def optional(package: str, ending: str):
    """The module, or the line that says what to install."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{ending} files need {package.split('.')[0]} ({error}); pip install 'jaxlm[data]'") from error


# ---- Bytes -----------------------------------------------------------------------------------------------------------------


def open_binary(file: str):
    """A local path, or a URL of what fsspec knows (gs://, s3://, memory://, ...); seekable."""
    if "://" not in file:
        return open(file, "rb")
    return optional("fsspec", file).open(file).open()


def open_stream(file: str):
    """The bytes of a file, decompressed where its ending says so."""
    source = open_binary(file)
    if file.endswith(".gz"):
        import gzip

        return gzip.GzipFile(fileobj=source)
    return io.BufferedReader(ZstdReader(source, file), CHUNK) if file.endswith(".zst") else source


class ZstdReader(io.RawIOBase):
    """Frames of zstd, one after another. A file cut short is an error here; zstandard's own reader takes it for the end."""

    def __init__(self, source, file: str):
        self.source, self.zstandard, self.rest, self.frame = source, optional("zstandard", file), b"", None

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.rest:
            data = self.frame.unused_data if self.frame and self.frame.eof else b""
            data = data or self.source.read(CHUNK)
            if not data:
                if self.frame and not self.frame.eof:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                self.rest = self.frame.decompress(data)
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count

    def close(self):
        self.source.close()
        super().close()


def decode(raw: bytes, errors: str, offset: int) -> str:
    """-> str, or Bad with the place in the file."""
    try:
        return raw.decode("utf-8", errors=errors)
    except UnicodeDecodeError as error:
        return Bad(f"invalid UTF-8 at byte {offset + error.start} (0x{raw[error.start]:02x}); mend the file, or set "
                   "data.errors=replace")


def raw_lines(extent: Extent) -> Iterator[tuple[int, int, bytes]]:
    """(number of the line in the extent, offset in the file, line). Blank ones are left out, but counted."""
    with open_stream(extent.file) as source:
        if extent.start:
            source.seek(extent.start)
        offset, number = extent.start, 0
        for number, line in enumerate(source, 1):
            if line.strip():
                yield number, offset, line
            offset += len(line)
            if extent.stop is not None and offset >= extent.stop:
                return


def cut_lines(file: str, size: int, about: int) -> list[Extent]:
    """Extents of whole lines of `about` bytes."""
    if file.endswith(COMPRESSED) or size <= about:
        return [Extent(file, 0, None, size)]
    places = [0]
    with open_binary(file) as source:
        while places[-1] + about < size:
            source.seek(places[-1] + about)
            source.readline()
            places.append(min(source.tell(), size))
    places = places if places[-1] == size else [*places, size]
    return [Extent(file, a, b, b - a) for a, b in zip(places, places[1:], strict=False)]


def lines_before(extent: Extent) -> int:
    """Lines of the file before the extent: looked up only for a message."""
    count, left = 0, extent.start
    with open_binary(extent.file) as source:
        while left > 0 and (block := source.read(min(left, CHUNK))):
            count, left = count + block.count(b"\n"), left - len(block)
    return count


# ---- Text ------------------------------------------------------------------------------------------------------------------


@FORMATS.register(".txt")
class Text:
    """By data.document a whole file, or each line that is not blank."""

    numbers = "lines"

    @staticmethod
    def cut(config, file, size, about):
        return cut_lines(file, size, about) if config.data.document == "line" else [Extent(file, 0, None, size)]

    @staticmethod
    def read(config, extent):
        if config.data.document == "line":
            for number, offset, line in raw_lines(extent):
                yield number, decode(line.rstrip(b"\r\n"), config.data.errors, offset)
        else:
            with open_stream(extent.file) as source:
                yield None, decode(source.read(), config.data.errors, 0)


class Parallel:
    """Files "train.de", "train.en" (data.parallel=("de", "en")): line n of each is a field, named by the ending, of record n.
    They are read by the first of them, as one extent."""

    numbers = "lines"

    @staticmethod
    def cut(config, file, size, about):
        return [Extent(file, 0, None, size)] if file.endswith(f".{config.data.parallel[0]}") else []

    @staticmethod
    def read(config, extent):
        first, *_ = endings = config.data.parallel
        files = {ending: extent.file.removesuffix(first) + ending for ending in endings}

        def lines(file):
            offset = 0
            with open_stream(file) as source:
                for line in source:
                    yield decode(line.rstrip(b"\r\n"), config.data.errors, offset)
                    offset += len(line)

        for number, texts in enumerate(itertools.zip_longest(*map(lines, files.values())), 1):
            if None in texts:
                shorter = next(file for file, text in zip(files.values(), texts, strict=True) if text is None)
                raise Broken(f"has more lines than {shorter} ({number - 1}), so they do not belong together")
            yield number, next((t for t in texts if isinstance(t, Bad)), dict(zip(endings, texts, strict=True)))


@FORMATS.register(".jsonl")
class JsonLines:
    """Each line that is not blank is one JSON object."""

    numbers = "lines"

    @staticmethod
    def cut(config, file, size, about):
        return cut_lines(file, size, about)

    @staticmethod
    def read(config, extent):
        for number, offset, line in raw_lines(extent):
            text = decode(line, config.data.errors, offset)
            yield number, text if isinstance(text, Bad) else parse_object(text, config.data.errors)


def parse_object(text: str, errors: str):
    try:
        record = json.loads(text)
    except ValueError as error:
        return Bad(f"not JSON ({error}); each line of a .jsonl file is one object: mend it, or set data.on_error=skip")
    if not isinstance(record, dict):
        return Bad(f"not a JSON object but {type(record).__name__}; each line of a .jsonl file is one object")
    if "\\ud" in text or "\\uD" in text:  # an escape may be half of a pair, which is not text
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            if errors == "strict":
                return Bad(f"half of a surrogate pair ({error.object[error.start]!a}); mend the file, or set "
                           "data.errors=replace")
            return {key: value.encode(errors="surrogatepass").decode(errors="replace") if isinstance(value, str) else value
                    for key, value in record.items()}
    return record


@FORMATS.register(".csv")
class Csv:
    """Quoted fields may span lines, so a file is one extent. The first row names the fields, unless data.header=False: then
    they are "0", "1", ..."""

    numbers, dialect = "lines", {"delimiter": ",", "strict": True}

    @staticmethod
    def cut(config, file, size, about):
        return [Extent(file, 0, None, size)]

    @classmethod
    def read(cls, config, extent):
        csv.field_size_limit(2**31 - 1)
        bad = []

        def lines():
            offset = 0
            with open_stream(extent.file) as source:
                for line in source:
                    text = decode(line, config.data.errors, offset)
                    if isinstance(text, Bad):
                        bad.append(text)
                        text = line.decode(errors="replace")
                    yield text.removeprefix("\ufeff") if offset == 0 else text
                    offset += len(line)

        rows, names = csv.reader(lines(), **cls.dialect), None
        while True:
            first = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield first, Bad(f"not {cls.__name__.upper()} ({error}); mend it, or set data.on_error=skip")
                continue
            if row is None:
                return
            if not row:
                continue
            if names is None:
                names = row if config.data.header else [str(i) for i in range(len(row))]
                if config.data.header:
                    continue
            if bad:
                yield first, bad.pop()
                bad.clear()
            elif len(row) != len(names):
                yield first, Bad(f"has {len(row)} fields, the first row has {len(names)}; mend it, or set data.on_error=skip")
            else:
                yield first, dict(zip(names, row, strict=True))


@FORMATS.register(".tsv")
class Tsv(Csv):
    """Tabs between fields; a quotation mark is a character like any other."""

    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


# ---- Records in binary files -----------------------------------------------------------------------------------------------


@FORMATS.register(".parquet")
class Parquet:
    """Extents are runs of row groups."""

    numbers = "rows"

    @staticmethod
    def open(file):
        parquet, pyarrow = optional("pyarrow.parquet", ".parquet"), optional("pyarrow", ".parquet")
        try:
            return parquet.ParquetFile(open_binary(file), page_checksum_verification=True)
        except pyarrow.ArrowInvalid as error:
            raise Broken(f"not a whole parquet file ({first_line(error)})") from error

    @classmethod
    def cut(cls, config, file, size, about):
        meta = cls.open(file).metadata
        places, held = [0], 0
        for group in range(meta.num_row_groups):
            held += meta.row_group(group).total_byte_size
            if held >= about:
                places, held = [*places, group + 1], 0
        places = places if places[-1] == meta.num_row_groups else [*places, meta.num_row_groups]
        share = size // max(1, len(places) - 1)
        return [Extent(file, a, b, share) for a, b in zip(places, places[1:], strict=False)]

    @classmethod
    def read(cls, config, extent):
        import pyarrow

        file = cls.open(extent.file)
        groups = range(extent.start, file.num_row_groups if extent.stop is None else extent.stop)
        number = sum(file.metadata.row_group(g).num_rows for g in range(extent.start))
        try:
            for group in groups:
                for batch in file.iter_batches(batch_size=256, row_groups=[group]):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, record
        except (pyarrow.ArrowException, OSError) as error:
            raise Broken(f"row {number + 1} cannot be read ({first_line(error)})") from error


@FORMATS.register(".arrow")
class Arrow:
    """An Arrow stream, as Hugging Face's `save_to_disk` writes it."""

    numbers = "rows"

    @staticmethod
    def cut(config, file, size, about):
        return [Extent(file, 0, None, size)]

    @staticmethod
    def read(config, extent):
        pyarrow, number = optional("pyarrow", ".arrow"), 0
        try:
            with open_binary(extent.file) as source, pyarrow.ipc.open_stream(source) as batches:
                for batch in batches:
                    for start in range(0, len(batch), 256):
                        for record in batch.slice(start, 256).to_pylist():
                            number += 1
                            yield number, record
        except (pyarrow.ArrowException, OSError) as error:
            raise Broken(f"row {number + 1} cannot be read ({first_line(error)})") from error


@FORMATS.register(".array_record")
class ArrayRecord:
    """A record is by data.array_record a JSON object, the text itself, or a tf.Example; extents are runs of records."""

    numbers, batch = "records", 64

    @staticmethod
    def open(file):
        if "://" in file:
            raise UserError(f"{file}: array_record files are read from local folders; copy it")
        try:
            reader = optional("array_record.python.array_record_module", ".array_record").ArrayRecordReader(file)
            if not reader.ok():  # a broken file has 0 records; why, reading one tells
                reader.read([0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise Broken(f"not a whole array_record file ({first_line(error)})") from error
        return reader

    @classmethod
    def cut(cls, config, file, size, about):
        count, pieces = cls.open(file).num_records(), max(1, round(size / about))
        places = [count * i // pieces for i in range(pieces + 1)]
        return [Extent(file, a, b, size // pieces) for a, b in zip(places, places[1:], strict=False) if a < b]

    @classmethod
    def read(cls, config, extent):
        parse, errors = ENCODINGS[config.data.array_record], config.data.errors
        reader = cls.open(extent.file)
        stop = reader.num_records() if extent.stop is None else extent.stop
        for start in range(extent.start, stop, cls.batch):
            try:
                records = reader.read(list(range(start, min(stop, start + cls.batch))))
            except (RuntimeError, ValueError, IndexError) as error:
                raise Broken(f"record {start + 1} cannot be read ({first_line(error)})") from error
            for number, raw in enumerate(records, start + 1):
                yield number, parse(raw, errors)


ENCODINGS = Registry("encoding", key="data.array_record")


@ENCODINGS.register("text")
def parse_text(raw: bytes, errors: str):
    return decode(raw, errors, 0)


@ENCODINGS.register("json")
def parse_json(raw: bytes, errors: str):
    text = decode(raw, errors, 0)
    return text if isinstance(text, Bad) else parse_object(text, errors)


@ENCODINGS.register("tf_example")
def parse_example(raw: bytes, errors: str):
    """The first value of each feature of bytes, by protobuf's wire format: Example{1: Features{1: {1: name, 2: Feature{1:
    BytesList{1: value}}}}}."""
    fields = {}
    try:
        for entry in (e for features in messages(raw, 1) for e in messages(features, 1)):
            name = next(messages(entry, 1)).decode()
            value = next((v for feature in messages(entry, 2) for many in messages(feature, 1) for v in messages(many, 1)), None)
            if value is not None:
                fields[name] = decode(value, errors, 0)
    except (IndexError, ValueError, StopIteration) as error:
        return Bad(f"not a tf.Example ({error}); set data.array_record")
    return next((v for v in fields.values() if isinstance(v, Bad)), fields)


def messages(raw: bytes, field: int) -> Iterator[bytes]:
    """The values of a field of protobuf's length-delimited kind."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value, shift, at = value | (raw[at] & 127) << shift, shift + 7, at + 1
            if raw[at - 1] < 128:
                return value

    while at < len(raw):
        key = varint()
        if key & 7 == 2:
            length = varint()
            if at + length > len(raw):
                raise ValueError("cut short")
            if key >> 3 == field:
                yield raw[at : at + length]
            at += length
        elif key & 7 == 0:
            varint()
        elif key & 7 in (1, 5):
            at += 8 if key & 7 == 1 else 4
        else:
            raise ValueError(f"wire type {key & 7}")


def first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


UNREADABLE = (EOFError, zlib.error, OSError)  # of a compressed file: cut short, damaged (gzip.BadGzipFile is an OSError)
