"""Tokenizers that others made, as their files: tokenizer.json, vocab.json with merges.txt, vocab.txt, a SentencePiece .model, or
a Hugging Face folder with one of them."""

import base64
import json
import pathlib

from jaxlm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from jaxlm.errors import UserError

# How Qwen 2 cuts text into words before BPE; its tokenizer_config.json names only the class.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def tokenizer_files(path: str) -> list[str]:
    """The files that say what the tokenizer is: those of a folder, or the file itself with the settings that lie beside it."""
    here = pathlib.Path(path)
    if here.is_dir():
        names = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "vocab.txt", "tokenizer_config.json",
                 "chat_template.jinja")
        return [str(here / name) for name in names if (here / name).is_file()] or sorted(map(str, here.glob("*.model")))
    beside = [here.with_name(name) for name in ("tokenizer_config.json", "chat_template.jinja")]
    return [path, *(str(file) for file in beside if file.is_file() and file != here)] if here.is_file() else []


def open_tokenizer(path: str):
    """A file, or a folder: its tokenizer.json, else its vocab.json and merges.txt, else its .model, else its vocab.txt."""
    files = {pathlib.Path(file).name: pathlib.Path(file) for file in tokenizer_files(path)}
    try:
        settings = json.loads(files["tokenizer_config.json"].read_text()) if "tokenizer_config.json" in files else {}
        models = [file for name, file in files.items() if name.endswith(".model")]
        if json_file := next((f for name, f in files.items() if name.endswith(".json") and not name.startswith(
                ("vocab", "tokenizer_config"))), None):
            text = json_file.read_text()
            if text.startswith('{"kind": '):  # what a store keeps
                return load_tokenizer(text)
            tokenizer = HuggingFaceTokenizer(text)
        elif "vocab.json" in files and "merges.txt" in files:
            tokenizer = byte_level_bpe(files["vocab.json"], files["merges.txt"], settings)
        elif models:
            tokenizer = SentencePieceTokenizer(base64.b64encode(models[0].read_bytes()).decode())
        elif "vocab.txt" in files:
            tokenizer = word_piece(files["vocab.txt"], settings)
        else:
            raise UserError(f"data.tokenizer={path!r}: holds no tokenizer; give a tokenizer.json, a SentencePiece .model, a "
                            "vocab.txt, or a folder with one of them or with vocab.json and merges.txt")
        template = files["chat_template.jinja"].read_text() if "chat_template.jinja" in files else \
            settings["chat_template"] if "chat_template" in settings else ""
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"data.tokenizer={path!r}: cannot be read ({error!r}); fetch it again") from error
    set_first(tokenizer, settings)
    # Several named templates: the one a conversation gets unless told otherwise.
    tokenizer.chat_template = template if isinstance(template, str) else {t["name"]: t["template"] for t in template}["default"]
    return tokenizer


def set_first(tokenizer, settings: dict) -> None:
    """tokenizer_config.json may say, otherwise than the tokenizer's own file, whether a text begins with the token for that."""
    if "add_bos_token" not in settings or settings["add_bos_token"] is None:
        return
    bos = settings["bos_token"] if "bos_token" in settings else None
    bos_id = tokenizer.token_id(bos["content"] if isinstance(bos, dict) else bos) if bos else None
    if not settings["add_bos_token"]:
        tokenizer.first = []
    elif bos_id is not None:
        tokenizer.first = [bos_id]


def byte_level_bpe(vocab, merges, settings: dict) -> HuggingFaceTokenizer:
    """GPT-2's kind, and Qwen 2's. Without a tokenizer_config.json no token is special in a text: "<|endoftext|>" is 13
    characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    try:
        inner = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"data.tokenizer={vocab.parent}: not a vocab.json and merges.txt of one another ({error})") from error
    prefix = bool(settings["add_prefix_space"]) if "add_prefix_space" in settings else False
    if "tokenizer_class" in settings and settings["tokenizer_class"].startswith("Qwen2"):
        inner.normalizer = normalizers.NFC()
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    inner.decoder = decoders.ByteLevel()
    added = settings["added_tokens_decoder"] if "added_tokens_decoder" in settings else {}
    for i, token in sorted(added.items(), key=lambda item: int(item[0])):
        options = {name: token[name] for name in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        inner.add_tokens([AddedToken(token["content"], **options)])
        if inner.token_to_id(token["content"]) != int(i):
            raise UserError(f"data.tokenizer={vocab.parent}: tokenizer_config.json gives {token['content']!r} the id {i}, which "
                            f"does not follow from vocab.json; use its tokenizer.json")
    return HuggingFaceTokenizer(inner.to_str())


def word_piece(vocab, settings: dict) -> HuggingFaceTokenizer:
    """BERT's kind; lower case, unless tokenizer_config.json says or the vocabulary shows that it is not."""
    from tokenizers import BertWordPieceTokenizer

    words = vocab.read_text(encoding="utf-8").splitlines()
    lower = not any(w != w.lower() for w in words if not w.startswith("["))
    if "do_lower_case" in settings:
        lower = settings["do_lower_case"]
    return HuggingFaceTokenizer(BertWordPieceTokenizer({w: i for i, w in enumerate(words)}, lowercase=lower).to_str())
