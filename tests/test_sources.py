"""Where files are looked for: lists, globs, URLs, saved datasets."""

import json

import pytest
from data_cases import jsonl, write

from jaxlm.data.loader import build_data
from jaxlm.data.sources import find_files, read_records
from jaxlm.errors import UserError


def test_lists_and_globs_are_sorted_within_each(config, tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        write(config, name, "x")
    found = find_files(config, "c.jsonl, *.txt,shakespeare", "data.path")
    assert [f.rsplit("/", 1)[1] for f in found] == ["c.jsonl", "a.txt", "b.txt", "input.txt"]


@pytest.mark.parametrize("path, message", [
    ("none.txt", "none.txt: no such file"), ("*.none", "no such file"), ("empty.txt", "empty.txt is empty"),
    ("sub", "a folder, but not a saved dataset"), ("memory://none/x.txt", "no such file"), ("nosuch://x", "cannot be looked up"),
])
def test_what_is_missing_is_named(config, tmp_path, path, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=message):
        find_files(config, path, "data.path")


def test_all_that_is_missing_is_named_at_once(config):
    config.data.path, config.data.valid_path, config.data.test_path = "a.txt,b.txt", "c.txt", "d.txt"
    mixture = (("one", "a.txt,b.txt", 1), ("two", "c.txt", 1))
    for keys in ({}, {"mixture": mixture, "valid_path": "", "test_path": ""}):
        config.data.update(keys)
        with pytest.raises(UserError) as error:
            build_data(config)
        assert [problem.rpartition("/")[2][:5] for problem in error.value.problems] == list(("a.txt", "b.txt", "c.txt", "d.txt"))[
            : 3 if keys else 4]


def test_remote_files_are_read_through_fsspec(config):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.jsonl", jsonl("b", "c").encode())
    memory.pipe("/corpus/a.jsonl", jsonl("a").encode())
    files = find_files(config, "memory://corpus/*.jsonl", "data.path")
    assert [r.text for r in read_records(config, files)] == ["a", "b", "c"]


def test_a_saved_dataset_is_its_files_in_order(config, tmp_path):
    """The folder as datasets 5 writes it."""
    import pyarrow

    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    for i, texts in enumerate((["x", "y"], ["z"])):
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(str(folder / f"data-{i:05d}-of-00002.arrow"), table.schema) as out:
            out.write_table(table)
    state = {"_data_files": [{"filename": f"data-{i:05d}-of-00002.arrow"} for i in (0, 1)], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    assert [r.text for r in read_records(config, find_files(config, "saved/train", "data.path"))] == ["x", "y", "z"]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(UserError, match="saved: holds the splits train; give one, such as .*saved/train"):
        find_files(config, "saved", "data.path")


@pytest.mark.parity("datasets")
def test_a_dataset_is_read_as_datasets_saves_it(config, tmp_path):
    import datasets

    datasets.Dataset.from_list([{"text": "real", "n": 1}, {"text": "one", "n": 2}]).save_to_disk(str(tmp_path / "real"))
    records = list(read_records(config, find_files(config, "real", "data.path")))
    assert [(r.text, r.fields) for r in records] == [("real", {"n": 1}), ("one", {"n": 2})]
