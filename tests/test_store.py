"""The token store: which one, how it is made (anew, in parallel, after a kill), what it is opened as."""

import errno
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from data_cases import jsonl, write

from jaxlm.data import contents, store, workers
from jaxlm.data.store import TokenStore, fingerprint, locate_store, open_store
from jaxlm.errors import UserError

WORDS = "the quick brown fox jumps over a lazy dog and eats 3 figs – 熊".split()


def corpus(documents=400, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) for _ in range(documents)]


def content(config) -> dict[str, str]:
    """{file of the store: sha256}, without the lines of the manifest that tell paths."""
    folder = locate_store(config)[0]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture
def small(monkeypatch):
    """Pieces of 2 kB, so that a small corpus has many."""
    monkeypatch.setattr(store, "SMALLEST", 2000)
    monkeypatch.setattr(store, "PIECES", 100)
    monkeypatch.setattr(workers, "ALONE", 2000)


@pytest.mark.parametrize("name, text, message", [
    ("none.txt", None, "no such file"), ("a.txt", "", "is empty"), ("b.txt", b"good\xffbad", "invalid UTF-8 at byte 4"),
    ("c.jsonl", '{"text": "x"}\nnot json\n', "c.jsonl:2: not JSON"), ("d.jsonl", '{"txt": "x"}\n', "no text in field 'text'"),
    ("e.jsonl", jsonl("", "", ""), "holds no text"), ("f.jsonl", "\n\n", "holds no text"),
])
def test_bad_files_are_named(config, name, text, message):
    config.data.path = name
    if text is not None:
        write(config, name, text)
    config.data.tokenizer = "byte"
    with pytest.raises(UserError, match=message):
        open_store(config)
    assert not list(pathlib.Path(config.data.store_dir).glob("tokens/*/manifest.json"))


def test_shakespeare_is_cut_as_nanogpt_cuts_it(config):
    stores, tokenizer = open_store(config)
    assert (stores["train"].num_tokens, stores["valid"].num_tokens, tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert tokenizer.decode(stores["train"].tokens(0, 14)) == "First Citizen:"


def test_two_documents_have_no_end_token_and_more_have(config):
    config.data.tokenizer = "byte"
    for texts, train in ((["ab", "cd"], b"ab"), (["ab", "cd", "e"], b"ab\0cd\0")):
        write(config, f"{len(texts)}.jsonl", jsonl(*texts))
        ids = open_store(config)[0]["train"].tokens(0, 99)
        assert bytes(np.where(ids == 256, 0, ids).astype(np.uint8)) == train


def test_a_split_of_its_own(config):
    config.data.tokenizer = "byte"
    write(config, "valid.jsonl", jsonl("xyz"))
    config.data.valid_path = "valid.jsonl"
    write(config, "train.jsonl", jsonl("ab", "cd"))
    stores, tokenizer = open_store(config)
    assert [tokenizer.decode(stores[s].tokens(0, 99)) for s in ("train", "valid")] == ["abcd", "xyz"]
    assert stores["valid"].num_bytes == 3 and stores["train"].document_starts.tolist() == [0, 3]


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_a_store_of_many_shards_holds_the_documents(config, small, tokenizer):
    texts = corpus()
    write(config, "a.jsonl", jsonl(*texts))
    config.data.tokenizer, config.data.bpe_vocab_size, config.data.valid_fraction, config.data.workers = tokenizer, 300, 0.2, 1
    stores, tok = open_store(config)
    assert len(list(stores["train"].folder.glob("*.bin"))) > 20
    end = [] if tok.eos_id is None else [tok.eos_id]
    for split, part in (("train", texts[:320]), ("valid", texts[320:])):
        ids = [[*tok.encode(text).tolist(), *end] for text in part]
        of = stores[split]
        assert of.tokens(0, 10**9).tolist() == sum(ids, [])
        assert of.document_starts.tolist() == [0, *np.cumsum([len(i) for i in ids])[:-1]]
        assert of.num_bytes == sum(len(text.encode()) for text in part)
        for start in range(0, of.num_tokens, 997):
            np.testing.assert_array_equal(of.tokens(start, start + 1500), sum(ids, [])[start : start + 1500])


def test_the_bytes_do_not_depend_on_the_workers(config, small):
    write(config, "a.jsonl", jsonl(*corpus()))
    config.data.tokenizer = "bpe"
    config.data.bpe_vocab_size = 300
    found = []
    for count in (1, 3):
        config.data.workers, config.data.store_dir = count, f"{config.data.root}/{count}"
        open_store(config)
        found.append(content(config))
    assert found[0] == found[1] and len(found[0]) > 20


KILLED = """
import os, signal, sys
from configs import default
from jaxlm.data import store, workers
from jaxlm.data.store import open_store
store.SMALLEST, store.PIECES, workers.ALONE = 2000, 100, 2000
config = default.get_config()
config.data.path, config.data.store_dir, config.data.tokenizer, config.data.bpe_vocab_size = sys.argv[1], sys.argv[2], "bpe", 300
config.data.workers = int(sys.argv[3])
made, shard = [], store.write_durably
def write(file, content):
    shard(file, content)
    made.append(file)
    if len(made) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
add = workers.Meter.add
def count(self, documents=0, size=0):
    add(self, documents, size)
    self.pieces = getattr(self, "pieces", 0) + bool(size)
    if self.pieces == 4:
        os.kill(os.getpid(), signal.SIGKILL)
if config.data.workers == 1:
    store.write_durably = write
else:
    workers.Meter.add = count
open_store(config)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_run_again_the_bytes_are_the_same_and_what_was_done_is_kept(config, small, tmp_path, workers, monkeypatch):
    path = write(config, "a.jsonl", jsonl(*corpus()))
    config.data.path, config.data.tokenizer, config.data.bpe_vocab_size, config.data.workers = str(path), "bpe", 300, 1
    open_store(config)
    whole, config.data.store_dir = content(config), str(tmp_path / "again")
    command = [sys.executable, "-c", KILLED, path, tmp_path / "again", str(workers)]
    killed = subprocess.run(command, capture_output=True, timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = locate_store(config)[0]
    assert not folder.exists()  # nothing under its final name
    done = [file for file in folder.parent.glob(".*.build/work/*.json") if not file.name.startswith(".")]
    made, make = [], store.make_shard
    monkeypatch.setattr("jaxlm.data.workers.make_shard",
                        lambda job, tok, piece, p: made.append(piece.number) or make(job, tok, piece, p))
    time.sleep(0.5)  # a worker of the dead may be at its last piece
    open_store(config)
    assert content(config) == whole and 3 <= len(done) and not {int(f.stem) for f in done} & set(made)
    assert not list(folder.parent.glob(".*.build"))


def test_a_full_disk_leaves_nothing_under_the_final_name_and_the_next_try_goes_on(config, small, monkeypatch):
    write(config, "a.jsonl", jsonl(*corpus()))
    config.data.workers, sync, count = 1, os.fsync, []

    def full(descriptor):
        count.append(descriptor)
        if len(count) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="data.store_dir=.*No space left on device.*; free space, .*is kept for the next try"):
        open_store(config)
    folder = locate_store(config)[0]
    assert not folder.exists() and not list(folder.parent.glob(".*.build/store/*.[0-9]*[0-9]"))
    open_store(config)
    assert (folder / "manifest.json").exists()


def test_a_store_is_made_once_and_follows_the_content(config, monkeypatch):
    write(config, "a.txt", "hello world, hello again. " * 8)
    open_store(config)
    first = fingerprint(config)
    with monkeypatch.context() as patch:
        patch.setattr("jaxlm.data.store.build_store", lambda *a: pytest.fail("built twice"))
        open_store(config)
    write(config, "a.txt", "something else")
    assert fingerprint(config) != first


def test_a_file_is_hashed_once_and_again_when_it_changes(config, monkeypatch):
    path = write(config, "a.txt", "hello")
    old = time.time() - 100
    os.utime(path, (old, old))
    changed = lambda file: (f"{path.stat().st_mtime_ns} {path.stat().st_size}", path.stat().st_mtime)
    monkeypatch.setattr(contents, "state_of", changed)  # without ctime, which is now
    hashed, hash_file = [], contents.hash_file
    monkeypatch.setattr(contents, "hash_file", lambda file: hashed.append(file) or hash_file(file))
    first = fingerprint(config)
    assert fingerprint(config) == first and len(hashed) == 1
    path.write_text("hellO")
    assert fingerprint(config) != first and len(hashed) == 2
    assert fingerprint(config) != first and len(hashed) == 3  # touched just now: it may change unseen


def test_a_source_that_changes_while_tokens_are_made_is_noticed(config, monkeypatch):
    path = write(config, "a.txt", "hello, world")
    make = store.make_shard
    monkeypatch.setattr("jaxlm.data.workers.make_shard", lambda *args: path.write_text("other") and make(*args))
    with pytest.raises(UserError, match="a.txt: changed while its tokens were made; run the same command again"):
        open_store(config)
    assert not list(pathlib.Path(config.data.store_dir).glob("tokens/*/manifest.json"))


def test_skipped_records_are_counted_in_the_log_and_the_manifest(config, small, capsys):
    write(config, "a.jsonl", jsonl(*corpus(100)) + "{\n" + jsonl(*corpus(100)) + '{"txt": 1}\n' + jsonl(*corpus(100)))
    config.data.on_error, config.data.tokenizer, config.data.workers = "skip", "byte", 2
    stores, _ = open_store(config)
    manifest = json.loads((stores["train"].folder / "manifest.json").read_text())
    assert manifest["skipped"]["count"] == 2 and manifest["splits"]["train"]["documents"] == 270
    first, second = manifest["skipped"]["first"]
    assert "a.jsonl:101: not JSON" in first and "a.jsonl:202: no text" in second
    assert "2 of 302 records were left out" in capsys.readouterr().err


def test_the_manifest_holds_hashes_of_sources_and_shards(config, small):
    path = write(config, "a.jsonl", jsonl(*corpus(100)))
    config.data.workers = 1
    folder = open_store(config)[0]["train"].folder
    manifest = json.loads((folder / "manifest.json").read_text())
    sha = lambda file: hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["sources"] == {str(path): {"sha256": sha(path), "bytes": path.stat().st_size}}
    assert len(manifest["shards"]) > 3 and all(sha(folder / s["file"]) == s["sha256"] for s in manifest["shards"])


def test_a_damaged_store_is_named(config):
    write(config, "a.txt", "hello, world")
    folder = open_store(config)[0]["train"].folder
    (folder / "00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="00000.bin: 0 of .* bytes are there; remove .*, and it is made again"):
        open_store(config)


def test_progress_is_told(capsys):
    meter = workers.Meter(total=100, done=20, every=0.0)
    meter.add(3)
    meter.add(2, 40)
    lines = capsys.readouterr().err.splitlines()
    assert "3 documents" in lines[0] and "time left not known yet" in lines[0]
    assert "5 documents" in lines[1] and "documents/s, 60% of the source" in lines[1] and lines[1].endswith("s left")


def test_ten_billion_tokens_open_at_once_in_constant_memory(tmp_path):
    """A sparse file, in a process of its own."""
    script = """
import json, os, pathlib, resource, sys, time
import numpy as np
from jaxlm.data.packing import PackedRows
from jaxlm.data.store import TokenStore, read_manifest
folder, tokens, documents = pathlib.Path(sys.argv[1]), 10**10, 2 * 10**7
shards = [{"file": f"{i:05d}.bin", "dtype": "uint16", "offset": 0, "tokens": tokens // 100} for i in range(100)]
for shard in shards:
    with open(folder / shard["file"], "wb") as out:
        out.truncate(2 * shard["tokens"])
with open(folder / "train-starts.npy", "wb") as out:
    np.lib.format.write_array_header_1_0(out, {"descr": "<i8", "fortran_order": False, "shape": (documents,)})
    np.array([0], "<i8").tofile(out)
    at = out.tell()
    out.truncate(at + 8 * (documents - 1))
    out.seek(-8, 2)
    np.array([tokens - 500], "<i8").tofile(out)
ranges = [[i, 0, tokens // 100] for i in range(100)]
manifest = {"splits": {"train": {"tokens": tokens, "documents": documents, "bytes": 1, "ranges": ranges}}, "shards": shards}
(folder / "manifest.json").write_text(json.dumps(manifest))
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
store = TokenStore(folder, "train", read_manifest(folder))
seconds = time.perf_counter() - began
rows = PackedRows(store, 1024, isolate=True, pad_last=False)
for i in range(0, len(rows), len(rows) // 50):
    rows.take([i])
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, store.num_tokens, len(rows)]))
"""
    run = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    seconds, kilobytes, tokens, rows = json.loads(run.stdout)
    assert (tokens, rows) == (10**10, (10**10 - 1) // 1024)
    assert seconds < 1 and kilobytes < 20_000


def test_a_split_may_begin_inside_a_shard(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "x.bin")
    np.save(tmp_path / "valid-starts.npy", np.array([0, 2]))
    manifest = {"shards": [{"file": "x.bin", "dtype": "uint16", "offset": 4, "tokens": 8}],
                "splits": {"valid": {"tokens": 3, "documents": 2, "bytes": 1, "ranges": [[0, 5, 8]]}}}
    assert TokenStore(tmp_path, "valid", manifest).tokens(0, 9).tolist() == [7, 8, 9]
