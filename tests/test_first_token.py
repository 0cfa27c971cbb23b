"""A text begins with the token that its model knows there."""

import json

import pytest

from configs import default
from jaxlm.data.store import open_store
from jaxlm.data.tokenizers import build_tokenizer, load_tokenizer


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


@pytest.mark.parity("transformers")
def test_the_first_token_is_that_of_transformers(tmp_path):
    import transformers
    from tokenizers import processors

    post = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = default.get_config()
    config.data.tokenizer = tokenizer_folder(tmp_path, post, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))("to be or", truncation=False, padding=False)
    assert build_tokenizer(config, []).encode("to be or").tolist() == theirs["input_ids"]
