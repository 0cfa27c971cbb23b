"""nanoGPT's, llm.c's and Megatron's files open as they lie."""

import pathlib
import struct

import numpy as np
import pytest

from jaxlm.data.loader import build_data
from jaxlm.data.store import open_store
from jaxlm.errors import UserError

DOCUMENTS = ["To be, or not", "to be", "that is – 熊", "the question:"]
IDS = [[*text.encode(), 256] for text in DOCUMENTS]


def megatron(folder, name, documents, dtype=np.uint16, code=8, document_of=None):
    """As Megatron-LM's IndexedDatasetBuilder writes it: one sequence for each list of `documents`."""
    sizes = np.array([len(d) for d in documents], np.int32)
    np.concatenate(documents).astype(dtype).tofile(folder / f"{name}.bin")
    pointers = (np.cumsum(sizes) - sizes).astype(np.int64) * np.dtype(dtype).itemsize
    borders = np.array(document_of or range(len(sizes) + 1), np.int64)
    (folder / f"{name}.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(borders))
                                         + sizes.tobytes() + pointers.tobytes() + borders.tobytes())


def use(config, path, valid="", tokenizer="byte"):
    config.data.path, config.data.valid_path, config.data.tokenizer = path, valid, tokenizer
    return open_store(config)


def test_nanogpts_files(config, tmp_path):
    np.array(sum(IDS[:3], []), np.uint16).tofile(tmp_path / "train.bin")
    np.array(IDS[3], np.uint16).tofile(tmp_path / "val.bin")
    stores, tokenizer = use(config, "train.bin", "val.bin")
    assert stores["train"].tokens(0, 99).tolist() == sum(IDS[:3], [])
    assert stores["train"].document_starts.tolist() == [0, 14, 20] and stores["valid"].document_starts.tolist() == [0]
    assert stores["valid"].num_bytes == len(DOCUMENTS[3]) and tokenizer.decode(stores["valid"].tokens(0, 3)) == "the"
    assert not list(stores["train"].folder.glob("*.bin"))  # nothing was copied
    config.data.isolate_documents = True
    row = build_data(config).valid.rows.take([0])
    assert row["segment_ids"].max() == 1


def test_a_header_of_llm_c_is_seen_and_a_part_is_held_out(config, tmp_path):
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, sum(map(len, IDS))
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes() + np.array(sum(IDS, []), np.uint16).tobytes())
    config.data.valid_fraction = 0.25
    stores, _ = use(config, "*.bin")
    assert stores["train"].tokens(0, 99).tolist() == sum(IDS[:3], []) and stores["valid"].tokens(0, 99).tolist() == IDS[3]
    assert stores["valid"].document_starts.tolist() == [0]


def test_two_files_are_one_split_cut_inside_one(config, tmp_path):
    np.array(IDS[0] + IDS[1], np.uint16).tofile(tmp_path / "a.bin")
    np.array(IDS[2] + IDS[3], np.uint16).tofile(tmp_path / "b.bin")
    config.data.valid_fraction = 0.75
    stores, _ = use(config, "a.bin,b.bin")
    assert stores["train"].tokens(0, 99).tolist() == IDS[0] and stores["valid"].tokens(0, 99).tolist() == sum(IDS[1:], [])
    assert stores["valid"].document_starts.tolist() == [0, 6, 6 + len(IDS[2])]


@pytest.mark.parametrize("dtype, code", [(np.uint16, 8), (np.int32, 4)])
def test_megatrons_pair(config, tmp_path, dtype, code):
    """Documents of one and of two sequences."""
    megatron(tmp_path, "m", IDS, dtype, code, document_of=[0, 2, 3, 4])
    config.data.valid_fraction = 0.34
    stores, _ = use(config, "m.bin")
    assert stores["train"].tokens(0, 99).tolist() == sum(IDS[:2], []) and stores["train"].document_starts.tolist() == [0]
    assert stores["valid"].tokens(0, 99).tolist() == sum(IDS[2:], [])
    assert stores["valid"].document_starts.tolist() == [0, len(IDS[2])]


def test_a_single_document_is_cut_by_tokens(config, tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "a.bin")
    stores, _ = use(config, "a.bin")
    assert (stores["train"].num_tokens, stores["valid"].tokens(0, 99).tolist()) == (90, list(range(90, 100)))


def odd(folder):
    (folder / "a.bin").write_bytes(b"123")


def large(folder):
    np.array([1, 2, 300], np.uint16).tofile(folder / "a.bin")


def cut(folder):
    megatron(folder, "a", IDS)
    (folder / "a.bin").write_bytes((folder / "a.bin").read_bytes()[:-2])


def cut_index(folder):
    megatron(folder, "a", IDS)
    (folder / "a.idx").write_bytes((folder / "a.idx").read_bytes()[:50])


def fine(folder):
    np.array([1, 2, 3], np.uint16).tofile(folder / "a.bin")


@pytest.mark.parametrize("make, path, tokenizer, message", [
    (odd, "a.bin", "byte", "a.bin: 3 bytes are not the uint16 ids"),
    (large, "a.bin", "byte", "a.bin: id 300 at token 2 is not among the 257 of data.tokenizer"),
    (cut, "a.bin", "byte", "a.idx: does not belong to .*a.bin"), (cut_index, "a.bin", "byte", "a.idx: cannot be read"),
    (fine, "a.bin", "char", "data.tokenizer=char: is made of text"),
    (fine, "a.bin,shakespeare", "byte", "input.txt: is no .bin; token files and texts cannot be one source"),
])
def test_what_does_not_fit_is_named(config, tmp_path, make, path, tokenizer, message):
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        use(config, path, tokenizer=tokenizer)
    assert not list(pathlib.Path(config.data.store_dir).glob("tokens/*/manifest.json"))
