"""The road from files to batches: sources, tokenizers, store, packing, loader."""

import json
import pathlib

import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.data.loader import Batches, build_data
from jaxlm.data.packing import PackedRows
from jaxlm.data.sources import read_splits
from jaxlm.data.store import build_store, fingerprint, open_store
from jaxlm.data.tokenizers import build_tokenizer, load_tokenizer
from jaxlm.errors import UserError


@pytest.fixture
def config(tmp_path):
    c = default.get_config()
    c.data.store_dir = str(tmp_path / "stores")
    c.data.root = str(tmp_path)
    c.seq_len, c.batch_size = 8, 4
    resolve(c)
    return c


def write(config, name, content):
    path = pathlib.Path(config.data.root, name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config.data.path = name
    return path


@pytest.mark.parametrize("name, content, message", [
    ("none.txt", None, "no such file"), ("a.txt", "", "is empty"), ("b.txt", b"good\xffbad", "invalid UTF-8 at byte 4"),
    ("c.jsonl", '{"text": "x"}\nnot json\n', "c.jsonl:2: not JSON"), ("d.jsonl", '{"txt": "x"}\n', "no text in field 'text'"),
])
def test_bad_files_are_named(config, name, content, message):
    if content is None:
        config.data.path = name
    else:
        write(config, name, content)
    with pytest.raises(UserError, match=message):
        open_store(config)
    assert not list(pathlib.Path(config.data.store_dir).glob("tokens/*"))


def test_invalid_utf8_can_be_replaced_and_documents_split(config):
    write(config, "b.txt", b"good\xffbad\nline two\n")
    config.data.errors, config.data.document = "replace", "line"
    assert read_splits(config) == {"train": ["good\ufffdbad"], "valid": ["line two"]}


def test_shakespeare_is_cut_as_nanogpt_cuts_it(config):
    stores, tokenizer = open_store(config)
    assert (stores["train"].num_tokens, stores["valid"].num_tokens, tokenizer.vocab_size) == (1_003_854, 111_540, 65)
    assert tokenizer.decode(stores["train"].tokens(0, 14)) == "First Citizen:"


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_tokenizers_round_trip_and_reload(config, name):
    config.data.tokenizer, config.data.bpe_vocab_size = name, 300
    text = "Ein Bär – 熊 🐻\n\tdone."
    tokenizer = build_tokenizer(config, [text])
    ids = tokenizer.encode(text)
    again = load_tokenizer(tokenizer.to_json())
    assert tokenizer.decode(ids) == text == again.decode(again.encode(text))
    assert max(ids) < tokenizer.vocab_size == again.vocab_size


def test_char_tokenizer_names_an_unknown_character(config):
    with pytest.raises(UserError, match="'z' at 2"):
        build_tokenizer(config, ["ab"]).encode("abz")


def test_store_is_made_once_and_follows_the_content(config, monkeypatch):
    write(config, "a.txt", "hello world, hello again. " * 8)
    open_store(config)
    first = fingerprint(config)
    monkeypatch.setattr("jaxlm.data.store.build_store", lambda *a: pytest.fail("built twice"))
    open_store(config)
    write(config, "a.txt", "something else")
    assert fingerprint(config) != first


def test_failed_build_leaves_nothing(config, monkeypatch):
    write(config, "a.txt", "hello")
    monkeypatch.setattr("jaxlm.data.store.write_split", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    folder = pathlib.Path(config.data.store_dir, "tokens", "x")
    with pytest.raises(UserError, match="No space left"):
        build_store(config, folder)
    assert list(folder.parent.iterdir()) == []


def test_shards_join_seamlessly(config, monkeypatch):
    monkeypatch.setattr("jaxlm.data.store.SHARD_TOKENS", 7)
    text = "abcdefghijklmnopqrstuvwxyz" * 3
    write(config, "a.txt", text)
    config.data.valid_fraction = 0.2
    stores, tokenizer = open_store(config)
    train = text[: int(0.8 * len(text))]
    assert tokenizer.decode(stores["train"].tokens(0, 10**6)) == train
    assert tokenizer.decode(stores["train"].tokens(5, 23)) == train[5:23]


def packed(config, isolate, **flags):
    write(config, "a.jsonl", "\n".join(json.dumps({"text": t}) for t in ("abcde", "fg", "hijklmnopq", "rst", "uvw")))
    config.data.tokenizer, config.data.valid_fraction = "byte", 0.2
    stores, _ = open_store(config)
    return stores["train"], PackedRows(stores["train"], 8, isolate, **flags)


def test_rows_cover_every_target_once(config):
    store, rows = packed(config, False, pad_last=True)
    batch = rows.take(range(len(rows)))
    np.testing.assert_array_equal(batch["targets"][batch["loss_mask"] > 0], store.tokens(1, store.num_tokens))


def test_isolated_documents_have_segments_positions_and_no_loss_across(config):
    store, rows = packed(config, True, pad_last=False)
    row = {name: a[0] for name, a in rows.take([0]).items()}  # a b c d e eos f g | target of the last is eos
    np.testing.assert_array_equal(row["segment_ids"], [1] * 6 + [2] * 2)
    np.testing.assert_array_equal(row["positions"], [0, 1, 2, 3, 4, 5, 0, 1])
    np.testing.assert_array_equal(row["loss_mask"], [1, 1, 1, 1, 1, 0, 1, 1])


def test_batches_are_pure_and_each_epoch_is_a_permutation(config):
    write(config, "a.txt", "".join(chr(32 + i % 90) for i in range(500)))
    batches = build_data(config).train
    np.testing.assert_array_equal(batches.batch(3)["tokens"], build_data(config).train.batch(3)["tokens"])
    epochs = [[int(batches.order[e * len(batches) + i]) for i in range(len(batches))] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(batches))) and epochs[0] != epochs[1]


def test_prefetch_from_any_step_gives_the_same_batches_and_hands_over_errors(config):
    write(config, "a.txt", "the quick brown fox " * 30)
    config.data.jitter = True
    batches = build_data(config).train
    sent = []
    stream = batches.prefetched(5, lambda arrays: sent.append(sorted(arrays)) or arrays)
    for step in (5, 6, 7):
        batch, again = next(stream), batches.batch(step)
        assert batch.keys() == again.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    stream.close()
    assert sent[0] == sorted(again) and sent[1] == sent[2] == ["targets", "tokens"]  # what does not change is sent once
    with pytest.raises(ZeroDivisionError):
        next(batches.prefetched(0, lambda b: 1 / 0))


def test_evaluation_batches_pad_with_masked_rows(config):
    write(config, "a.txt", "abc " * 200)
    data = build_data(config)
    total = sum(b["loss_mask"].sum() for b in data.valid.evaluation_batches())
    assert total == data.valid.rows.store.num_tokens - 1
    assert isinstance(data.valid, Batches)


@pytest.mark.parametrize("change, message", [
    (dict(seq_len=5000), "longer than the training data"), (dict(vocab=3), "smaller than the tokenizer's")])
def test_data_that_does_not_fit(config, change, message):
    write(config, "a.txt", "abcdefgh" * 20)
    config.seq_len = change.pop("seq_len", 8)
    config.model.vocab_size = change.pop("vocab", 0)
    with pytest.raises(UserError, match=message):
        build_data(config)


def tokenizer_folder(folder, post_processor=None, **settings):
    """A tokenizer.json of words with <s> and </s>, and tokenizer_config.json with `settings`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "to": 2, "be": 3, "or": 4}, unk_token="or"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.enable_truncation(4)  # what a folder may say of a model's longest text, and must not cut documents off
    inner.enable_padding(length=6)
    if post_processor:
        inner.post_processor = post_processor
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    if settings:
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(kind | settings))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("template, settings, first", [
    ("<s> $A", {}, [0]), ("<s> $A </s>", {}, [0]), (None, {}, []), ("$A </s>", {}, []),
    ("<s> $A", {"add_bos_token": False}, []), (None, {"add_bos_token": True}, [0]), ("<s> $A", {"add_bos_token": None}, [0]),
    (None, {"add_bos_token": True, "bos_token": {"content": "<s>"}}, [0])])
def test_a_text_begins_with_the_token_that_its_model_knows_there(template, settings, first, tmp_path):
    from tokenizers import processors

    post = template and processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    config = default.get_config()
    config.data.tokenizer = tokenizer_folder(tmp_path, post, **settings)
    tokenizer = build_tokenizer(config, [])
    assert tokenizer.encode("to be or to be").tolist() == [*first, 2, 3, 4, 2, 3]
    again = load_tokenizer(tokenizer.to_json())  # as the token store keeps it
    assert again.encode("be").tolist() == [*first, 3] and again.decode(again.encode("be")) == "be"


def test_documents_begin_and_end_as_transformers_would_have_it(tmp_path):
    from tokenizers import processors

    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = default.get_config()
    config.data.tokenizer = tokenizer_folder(tmp_path / "t", post)
    (tmp_path / "text.txt").write_text("to be\nbe or\nto\n")
    config.data.path, config.data.document, config.data.store_dir = str(tmp_path / "text.txt"), "line", str(tmp_path)
    stores, _ = open_store(config)
    assert stores["train"].tokens(0, 99).tolist() == [0, 2, 3, 1, 0, 3, 4, 1]
    tokenizer_folder(tmp_path / "t", post, add_bos_token=False)  # another way to cut text: not the same store
    assert open_store(config)[0]["train"].tokens(0, 99).tolist() == [2, 3, 1, 3, 4, 1]


def test_the_first_token_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import processors

    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = default.get_config()
    config.data.tokenizer = tokenizer_folder(tmp_path, post, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))("to be or", truncation=False, padding=False)
    assert build_tokenizer(config, []).encode("to be or").tolist() == theirs["input_ids"]
