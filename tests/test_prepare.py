"""`jaxlm data prepare` end to end: counts that are known, the same bytes however it was run, and messages."""

import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.config import load
from jaxlm.data.cleaning.pipeline import prepare
from jaxlm.data.cleaning.runners import BeamRunner, LocalRunner
from jaxlm.data.cleaning.shards import read_lines
from jaxlm.errors import UserError

STEPS = ("unicode", "html", "pii", "length", "repetition", "language", "exact_duplicates", "near_duplicates", "decontaminate")
QUESTION = "How many roads must a traveller walk down before the people of the far valley call him by his name"


def sentence(rng):
    words = "the sea a man of boat net wind cold north was young old house that field green stone river had with light".split()
    return " ".join(rng.choice(words) + rng.choice(["", "", "s", "ly", "ing"]) for _ in range(12)).capitalize() + "."


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 different documents in two jsonl files, and one each of what the steps look for. -> (folder, what is in it)"""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("corpus")
    good = [" ".join(sentence(rng) for _ in range(8)) for _ in range(40)]
    files = {"a.jsonl": good[:20], "b.jsonl": [
        *good[20:], "", "again " * 60,
        "Der alte Mann ging hinaus aufs Meer, weil das Wetter ihm gefiel, und kam am Abend wieder.",
        good[3].upper(),  # the same but for case
        good[30] + " More.",  # nearly the same as one before, in its own file
        good[5].replace(".", ". So", 1),  # as one of the other file
        good[7][:300] + " " + QUESTION + ". " + good[8][:300], "<p>Write to <b>me</b>: jo@example.org</p> " + sentence(rng)]}
    for name, texts in files.items():
        lines = [json.dumps({"text": text, "url": f"{name}/{i}"}) for i, text in enumerate(texts)]
        (folder / name).write_text("\n".join(lines) + "\n")
    (folder / "questions.jsonl").write_text(json.dumps({"q": QUESTION + "?", "a": ["42", "too short to look for"]}) + "\n")
    return folder


KEYS = {"steps": STEPS, "shard_characters": 4000, "count_tokens": "byte", "length.min_characters": 20, "language.keep": ("en",),
        "language.min_score": 0.2, "near_duplicates.threshold": 0.7, "decontaminate.paths": "questions.jsonl"}
OVERRIDES = tuple(f"--config.prepare.{key}={value}" for key, value in KEYS.items())


def plain_config(folder, *overrides):
    return load("configs/default.py", [f"--config.{key}" for key in (f"data.root={folder}", *overrides)])


def config_of(folder, *overrides):
    return load("configs/default.py", [f"--config.data.root={folder}", "--config.data.path=*[ab].jsonl", *OVERRIDES,
                                       *(f"--config.{key}" for key in overrides)])


def contents(out):
    """name -> bytes of all that is made but how long it took and when the sources were written."""
    out = pathlib.Path(out)
    found = {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    card = json.loads(found.pop("card.json"))
    for step in card["steps"]:
        del step["seconds"]
    del found["card.html"], found["plan.json"]
    return {**found, "card": card}


def documents(out):
    return [document for shard in sorted(pathlib.Path(out).glob("shard-*")) for document in read_lines(shard)]


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference") / "clean"
    prepare(config_of(corpus), str(out), LocalRunner(1, ""))
    return out


def test_every_document_is_accounted_for(corpus, reference):
    card = json.loads((reference / "card.json").read_text())
    removed = {step["step"]: step["removed"] for step in card["steps"] if step["removed"]}
    assert removed == {
        "length": {"empty": 1}, "repetition": {"characters in the most frequent 2-gram": 1}, "language": {"language de": 1},
        "exact_duplicates": {"same as an earlier document": 1}, "near_duplicates": {"nearly the same as an earlier document": 2},
        "decontaminate": {"overlaps an evaluation set": 1}}
    assert [step["step"] for step in card["steps"]] == list(STEPS)
    left = card["input"]["documents"]
    for step in card["steps"]:
        assert (step["documents_in"], step["documents_in"] - step["documents_out"]) == (left, sum(step["removed"].values()))
        left = step["documents_out"]
    assert (card["input"]["documents"], left) == (48, 41) == (48, card["output"]["documents"])
    found = documents(reference)
    texts = [document["text"] for document in found]
    assert card["output"]["characters"] == sum(map(len, texts)) and card["output"]["tokens"] == len("".join(texts).encode())
    assert sum(card["output"]["lengths"].values()) == 41 and card["output"]["languages"]["en"]["documents"] == 41
    assert {name: (c["in"]["documents"], c["out"]["documents"]) for name, c in card["sources"].items()} == {
        "a.jsonl": (20, 20), "b.jsonl": (28, 21)}
    assert list(found[0]) == ["text", "source", "url", "language", "language_score"]
    assert [found[0][key] for key in ("source", "url", "language")] == ["a.jsonl:1", "a.jsonl/0", "en"]
    assert texts[-1].startswith("Write to me: [EMAIL]") and card["steps"][2]["counts"]["email"] == 1
    assert [document["source"] for document in found] == [*(f"a.jsonl:{i}" for i in range(1, 21)),
                                                          *(f"b.jsonl:{i}" for i in range(1, 21)), "b.jsonl:28"]


def test_what_was_removed_is_told(reference):
    removed = {file.stem: list(read_lines(file)) for file in (reference / "removed").glob("*.jsonl")}
    assert set(removed) == {"length", "repetition", "language", "exact_duplicates", "near_duplicates", "decontaminate"}
    (line,) = removed["decontaminate"]
    ngram = "'" + " ".join(QUESTION.lower().split()[:13]) + "'"
    assert (line["source"], line["detail"]) == ("b.jsonl:27", f"{ngram} is in questions.jsonl:1")
    (line,) = removed["exact_duplicates"]
    assert (line["source"], line["detail"]) == ("b.jsonl:24", "kept: a.jsonl:4")
    assert line["kept_excerpt"].upper() == line["excerpt"]
    assert [(x["source"], x["detail"]) for x in removed["near_duplicates"]] == [("b.jsonl:25", "kept: b.jsonl:11"),
                                                                               ("b.jsonl:26", "kept: a.jsonl:6")]
    page = (reference / "card.html").read_text()
    assert "language de" in page and "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_workers_and_order_do_not_change_the_bytes(corpus, reference, tmp_path):
    class Backwards(LocalRunner):
        def map(self, function, items):
            return super().map(function, items[::-1])

    prepare(config_of(corpus), str(tmp_path / "two"), LocalRunner(2, ""))
    prepare(config_of(corpus), str(tmp_path / "backwards"), Backwards(1, ""))
    assert contents(tmp_path / "two") == contents(reference) == contents(tmp_path / "backwards")
    assert len(list(reference.glob("shard-*"))) > 4 and not (tmp_path / "two.partial").exists()


def test_shards_do_not_change_what_is_kept(corpus, reference, tmp_path):
    config = config_of(corpus, "prepare.shard_characters=1000000", "prepare.format=jsonl")
    prepare(config, str(tmp_path / "one"), LocalRunner(1, ""))
    assert documents(tmp_path / "one") == documents(reference)
    assert [file.name for file in (tmp_path / "one").glob("shard*")] == ["shard-000000.jsonl"]


def test_cleaning_what_is_clean_changes_nothing(corpus, reference, tmp_path):
    plain = tmp_path / "plain"
    prepare(config_of(corpus, "prepare.format=jsonl"), str(plain), LocalRunner(1, ""))
    config = config_of(plain, "data.path=shard-*.jsonl", f"prepare.decontaminate.paths={corpus}/questions.jsonl")
    card = prepare(config, str(tmp_path / "again"), LocalRunner(1, ""))
    assert documents(tmp_path / "again") == documents(reference)
    assert all(step["documents_in"] == step["documents_out"] and not step["counts"] for step in card["steps"])


@pytest.mark.parametrize("killed_at", ["clean-0", "match-1", "clean-2"])
def test_killed_at_any_point_it_goes_on_to_the_same_bytes(corpus, reference, tmp_path, killed_at):
    """In the middle of a stage: after its second unit, a file half written."""
    class Killed(BaseException):
        pass

    class Runner(LocalRunner):
        def map(self, function, items):
            for i, result in enumerate(super().map(function, items)):
                if function.args[1] == killed_at and i == 1:
                    raise Killed
                yield result

    out = tmp_path / "clean"
    with pytest.raises(Killed):
        prepare(config_of(corpus), str(out), Runner(1, ""))
    assert not out.exists()
    (out.with_name("clean.partial") / "out").mkdir(exist_ok=True)
    (out.with_name("clean.partial") / "out" / "shard-000002.jsonl.zst.77.tmp").write_bytes(b"half")
    done = {file: file.stat().st_mtime_ns for file in out.with_name("clean.partial").glob("results/*/*.json")}
    with pytest.raises(UserError, match="unfinished work of another config"):
        prepare(config_of(corpus, "prepare.length.min_characters=21"), str(out), LocalRunner(1, ""))
    assert done == {file: file.stat().st_mtime_ns for file in done} and len(done) > 2
    prepare(config_of(corpus), str(out), LocalRunner(1, ""))
    assert contents(out) == contents(reference)


def command(corpus, out, *arguments):
    return [sys.executable, "-m", "jaxlm.cli", "data", "prepare", "--config=configs/default.py", f"--out={out}",
            f"--config.data.root={corpus}", "--config.data.path=*[ab].jsonl", *OVERRIDES, *arguments]


def test_kill_dash_nine_and_run_again(corpus, reference, tmp_path):
    """The parent alone is killed: its workers end by themselves, and the same command ends with the same bytes."""
    out = tmp_path / "clean"
    process = subprocess.Popen(command(corpus, out, "--workers=2"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("clean.partial/results/clean-0/*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not out.exists() and len(children) >= 2
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    again = subprocess.run(command(corpus, out, "--workers=1"), capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.startswith("48 documents") and "clean-2" in again.stderr, again.stderr
    assert contents(out) == contents(reference)
    once_more = subprocess.run(command(corpus, out), capture_output=True, text=True)
    assert (once_more.returncode, once_more.stdout, once_more.stderr) == (0, again.stdout, "")  # done already


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs jaxlm[beam]")
def test_beam_makes_the_same_bytes(corpus, reference, tmp_path):
    prepare(config_of(corpus), str(tmp_path / "beam"), BeamRunner(1, ""))
    assert contents(tmp_path / "beam") == contents(reference)
    with pytest.raises(UserError, match=r"b.jsonl:2: not JSON"):
        (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": \n')
        prepare(plain_config(tmp_path, "data.path=b.jsonl"), str(tmp_path / "bad"), BeamRunner(1, ""))


def test_documents_begin_where_a_pattern_matches(tmp_path):
    (tmp_path / "a.txt").write_text("Front matter\nChapter 1\nOne.\nChapter 2\nTwo. Chapter 3 is not here.\n")
    keys = ("data.path=a.txt", "prepare.steps=('unicode',)", "prepare.split_at=^Chapter ", "prepare.format=jsonl")
    prepare(plain_config(tmp_path, *keys), str(tmp_path / "out"), LocalRunner(1, ""))
    assert documents(tmp_path / "out") == [
        {"text": "Front matter", "source": "a.txt#1"}, {"text": "Chapter 1\nOne.", "source": "a.txt#2"},
        {"text": "Chapter 2\nTwo. Chapter 3 is not here.", "source": "a.txt#3"}]


def test_no_document_left(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    keys = ("data.path=a.txt", "prepare.steps=('length','near_duplicates')", "prepare.length.min_characters=9")
    card = prepare(plain_config(tmp_path, *keys), str(tmp_path / "out"), LocalRunner(1, ""))
    assert card["output"]["documents"] == 0 and documents(tmp_path / "out") == []
    assert "too few characters" in (tmp_path / "out" / "card.html").read_text()


def test_a_step_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_steps.py").write_text(
        "from jaxlm.data.cleaning.step import STEPS, Removed\n"
        "@STEPS.register('shout')\n"
        "def build(options, context):\n"
        "    return lambda record: Removed('quiet') if record.text.islower() else record._replace(text=record.text + '!')\n")
    (tmp_path / "a.jsonl").write_text('{"text": "Loud"}\n{"text": "still"}\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    config = plain_config(tmp_path, "data.path=a.jsonl", "imports=('my_steps',)", "prepare.steps=('shout',)")
    card = prepare(config, str(tmp_path / "out"), LocalRunner(1, ""))
    assert [d["text"] for d in documents(tmp_path / "out")] == ["Loud!"] and card["steps"][0]["removed"] == {"quiet": 1}


def problems(corpus, *overrides, out="nowhere"):
    with pytest.raises(UserError) as error:
        given = [f"--config.{o}" for o in overrides]
        prepare(config_of(corpus, *overrides), str(corpus / out), LocalRunner(1, ""), given)
    assert not (corpus / f"{out}.partial").exists()
    return error.value.problems


def test_messages(corpus, reference):
    assert "did you mean language?" in problems(corpus, "prepare.steps=('langage',)")[0]
    assert "named more than once" in problems(corpus, "prepare.steps=('html','length','html')")[0]
    wrong = ("prepare.format=json", "prepare.split_at=(", "prepare.shard_characters=0", "prepare.count_tokens=x.json")
    assert len(problems(corpus, *wrong)) == 4
    wrong = ("prepare.near_duplicates.bands=0", "prepare.unicode.form=NFQ", "prepare.decontaminate.min_words=14")
    assert len(problems(corpus, *wrong)) == 3
    assert "'c4' is not among prepare.steps" in problems(corpus, "prepare.c4.min_sentences=2")[0]
    assert "no such file" in problems(corpus, "prepare.decontaminate.paths=nothing.jsonl")[0]
    with pytest.raises(UserError, match="unknown key; did you mean prepare.length.min_words"):
        config_of(corpus, "prepare.length.min_word=3")
    with pytest.raises(UserError, match="exists, and was not made by this config"):
        prepare(config_of(corpus, "prepare.length.min_characters=30"), str(reference), LocalRunner(1, ""))
    with pytest.raises(UserError, match="a folder of a file system"):
        prepare(config_of(corpus), "gs://bucket/out", LocalRunner(1, ""))
    with pytest.raises(UserError, match="--workers=-1"):
        LocalRunner(-1, "")


def test_a_broken_source_stops_with_its_line_and_goes_on_when_mended(tmp_path):
    bad, out = tmp_path / "a.jsonl", str(tmp_path / "out")
    bad.write_text('{"text": "good"}\n{"text": "half\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"a.jsonl:2: not JSON"):
            prepare(plain_config(tmp_path, "data.path=a.jsonl"), out, LocalRunner(1, ""))
    assert not os.path.exists(out)
    bad.write_text('{"text": "good"}\n{"text": "whole"}\n')
    prepare(plain_config(tmp_path, "data.path=a.jsonl"), out, LocalRunner(1, ""))
    assert [document["text"] for document in documents(out)] == ["good", "whole"]


def test_any_format_and_what_cannot_be_read_is_counted(corpus, reference, tmp_path):
    """As gzip and zstandard, one of them in parts of a file, with two broken lines: the same documents, and the lines named."""
    import gzip

    import zstandard

    lines = (corpus / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join([*lines[:10], b'{"text": 3}\n', *lines[10:], b"{half\n"]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress((corpus / "b.jsonl").read_bytes()))
    (tmp_path / "questions.jsonl.gz").write_bytes(gzip.compress((corpus / "questions.jsonl").read_bytes()))
    keys = ("data.path=a.jsonl,b.jsonl.zst", "data.on_error=skip", "prepare.decontaminate.paths=questions.jsonl.gz")
    card = prepare(config_of(tmp_path, *keys), str(tmp_path / "out"), LocalRunner(1, ""))
    assert [document["text"] for document in documents(tmp_path / "out")] == [d["text"] for d in documents(reference)]
    skipped = card["input"]["skipped"]
    assert skipped["count"] == 2
    assert "a.jsonl:11: no text" in skipped["first"][0] and "a.jsonl:22: not JSON" in skipped["first"][1]
    assert documents(tmp_path / "out")[19]["source"] == "a.jsonl:21"  # lines are counted from the file's start


def test_training_takes_the_config_and_the_outcome(corpus, reference):
    """One file may say how data is cleaned and what trains on it: training does not ask who reads `prepare`."""
    from configs import default
    from jaxlm.config import Tracked, fingerprint

    config = config_of(corpus)
    tracked = Tracked(config)
    assert not any(line.startswith("prepare") for line in tracked.unread(default.get_config()))
    assert fingerprint(config) == fingerprint(config_of(corpus, "prepare.length.min_characters=3"))
