"""Each format gives the same documents, whole or in extents, and says what is wrong with a broken file."""

import gzip
import json

import numpy as np
import pytest
from data_cases import jsonl, shared, write

from jaxlm.data.formats import format_of
from jaxlm.data.sources import Skipped, find_files, read_records, read_texts
from jaxlm.errors import UserError

TEXTS = ["eins", "zwei – 二\nzweite Zeile", "", 'drei, "drei"', "vier\tvier"] * 40
ROWS = [{"text": text, "number": i} for i, text in enumerate(TEXTS)]


def tf_example(row) -> bytes:
    """As TensorFlow writes it."""
    field = lambda number, value: bytes([number << 3 | 2]) + bytes([len(value) & 127 | 128, len(value) >> 7]) + value
    entry = field(1, b"text") + field(2, field(1, field(1, row["text"].encode())))
    count = field(1, b"number") + field(2, field(3, field(1, bytes([row["number"] & 127]))))
    return field(1, field(1, count) + field(1, entry))


def save(config, name, rows=ROWS):
    """The rows as a file of that ending; it becomes data.path."""
    import pyarrow
    import pyarrow.parquet
    import zstandard
    from array_record.python.array_record_module import ArrayRecordWriter

    path = write(config, name, "")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    table = pyarrow.Table.from_pylist(rows)
    quote = lambda text: '"' + text.replace('"', '""') + '"'
    if name.endswith(".jsonl"):
        path.write_bytes(lines)
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines))
    elif name.endswith(".jsonl.zst"):
        frame = zstandard.ZstdCompressor().compress
        path.write_bytes(frame(lines[:1000]) + frame(lines[1000:]))
    elif name.endswith(".csv"):
        path.write_text("number,text\n" + "".join(f"{row['number']},{quote(row['text'])}\n" for row in rows))
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=17, write_page_checksum=True)
    elif name.endswith(".arrow"):
        with pyarrow.ipc.new_stream(str(path), table.schema) as out:
            out.write_table(table, max_chunksize=23)
    else:
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write({"json": json.dumps(row).encode(), "tf_example": tf_example(row),
                          "text": row["text"].encode()}[config.data.array_record])
        writer.close()
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.arrow", "a.array_record"]


@pytest.mark.parametrize("name", NAMES)
def test_documents_fields_and_extents(config, name):
    path = save(config, name)
    records = list(read_records(config, [str(path)]))
    assert [r.text for r in records] == TEXTS
    assert [int(r.fields["number"]) for r in records] == list(range(len(TEXTS))) and records[0].where.startswith(f"{path}:")
    extents = format_of(name).cut(config, str(path), path.stat().st_size, 300)
    assert len(extents) > 5 or name.endswith((".gz", ".zst", ".csv", ".arrow"))
    assert list(read_texts(config, extents, Skipped())) == TEXTS


@pytest.mark.parametrize("encoding", ["text", "tf_example"])
def test_array_records_of_other_kinds(config, encoding):
    config.data.array_record = encoding
    path = save(config, "a.array_record")
    assert [r.text for r in read_records(config, [str(path)])] == TEXTS
    config.data.array_record = "json"
    with pytest.raises(UserError, match=r"a.array_record:1: "):
        list(read_records(config, [str(path)]))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.array_record"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_is_named_and_can_be_left_out_from_there(config, name, damage):
    path = save(config, name, [{"number": i, "text": f"{i} " + np.random.default_rng(i).bytes(300).hex()} for i in range(400)])
    raw = path.read_bytes()
    middle = len(raw) // 2
    path.write_bytes(raw[:middle] if damage == "cut" else raw[:middle] + bytes(64) + raw[middle + 64 :])
    if name == "a.arrow" and damage == "flip":
        pytest.skip("an Arrow stream has no checksums")
    told = "" if damage == "flip" and name == "a.jsonl.gz" else "; fetch it again"  # deflate may go on for a while: not JSON
    with pytest.raises(UserError, match=rf"{name}:.*{told}"):
        list(read_records(config, [str(path)]))
    config.data.on_error = "skip"
    skipped = Skipped()
    kept = [r.text for r in read_records(config, [str(path)], skipped)]
    assert all(text.startswith(f"{i} ") for i, text in enumerate(kept)) and len(kept) < 400
    assert skipped.count >= 1 and name in skipped.first[0]


@pytest.mark.parametrize("name, content, line, message", [
    ("c.jsonl", '{"text": "x"}\n\nnot json\n{"text": "y"}\n', 3, "not JSON"),
    ("d.jsonl", '{"text": "x"}\n{"txt": "x", "id": 1}\n{"text": "y"}\n', 2, r"no text in field 'text' \(it has: txt, id\)"),
    ("e.jsonl", '{"text": "x"}\n[1]\n{"text": "y"}\n', 2, "not a JSON object but list"),
    ("f.jsonl", '{"text": "x"}\n{"text": "\\ud83d"}\n{"text": "y"}\n', 2, "half of a surrogate pair"),
    ("g.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n{"text": "y"}\n', 2, "invalid UTF-8 at byte 24"),
    ("h.csv", 'text,n\nx,1\nz,"1\ny",2\n"z",1,2\ny,2\n', 3, "fields"),
    ("i.csv", b"text,n\nx,1\n\xff,2\ny,3\n", 3, "invalid UTF-8"),
    ("j.tsv", "text\tn\nx\t1\nz\ny\t3\n", 3, "has 1 fields, the first row has 2"),
])
def test_a_bad_record_is_named_by_file_and_line_or_skipped(config, name, content, line, message):
    path = write(config, name, content)
    with pytest.raises(UserError, match=rf"{name}:{line}: .*{message}"):
        list(read_records(config, [str(path)]))
    config.data.on_error = "skip"
    skipped = Skipped()
    texts = [r.text for r in read_records(config, [str(path)], skipped)]
    assert texts[0] == "x" and texts[-1] == "y" and skipped.count >= 1


def test_the_line_is_told_in_an_extent_too(config):
    path = write(config, "a.jsonl", jsonl(*["x" * 50] * 20) + "broken\n" + jsonl("y"))
    extents = format_of("a.jsonl").cut(config, str(path), path.stat().st_size, 200)
    assert len(extents) > 4
    with pytest.raises(UserError, match="a.jsonl:21: not JSON"):
        list(read_texts(config, extents, Skipped()))


def test_tables_without_a_header_and_quotes_in_tsv(config):
    path = write(config, "a.tsv", '1\tsay "hi\n0\tyes\n')
    config.data.header, config.data.text_field = False, "1"
    assert [(r.text, r.fields, r.where) for r in read_records(config, [str(path)])] == [
        ('say "hi', {"0": "1"}, f"{path}:1"), ("yes", {"0": "0"}, f"{path}:2")]
    path.write_bytes(b"\xef\xbb\xbftext\tlabel\nfine\t1\n")
    config.data.header, config.data.text_field = True, "text"
    assert [r.text for r in read_records(config, [str(path)])] == ["fine"]


def test_invalid_utf8_can_be_replaced_and_lines_are_documents(config):
    path = write(config, "b.txt", b"good\xffbad\r\n\nline two\n")
    config.data.errors, config.data.document = "replace", "line"
    assert [(r.text, r.where) for r in read_records(config, [str(path)])] == [
        ("good\ufffdbad", f"{path}:1"), ("line two", f"{path}:3")]


def test_the_shared_samples_hold_the_same_documents(config):
    folder = shared("format-samples")
    texts = {name: [r.text for r in read_records(config, find_files(config, str(folder / name), "data.path"))]
             for name in ("docs.jsonl", "docs.jsonl.gz", "docs.jsonl.zst", "docs.parquet")}
    assert len(texts["docs.jsonl"]) == 100 and len({tuple(of) for of in texts.values()}) == 1
    config.data.document = "line"
    lines = [r.text.replace("\\n", "\n") for r in read_records(config, [str(folder / "docs.txt")])]
    assert lines == texts["docs.jsonl"]
