"""Tokenizers: text <-> ids. Each has vocab_size, eos_id (or None), encode, decode and to_json."""

import itertools
import json
import pathlib

import numpy as np

from jaxlm.errors import UserError
from jaxlm.registry import Registry, did_you_mean

TOKENIZERS = Registry("tokenizer", key="data.tokenizer")
EOS = "<|endoftext|>"


def build_tokenizer(config, documents: list[str]):
    """From config.data.tokenizer: a registered name, or the path of a tokenizer.json. `documents` are what it may learn
    from (all splits: an id must exist for every character that occurs)."""
    name = config.data.tokenizer
    if name in TOKENIZERS:
        return TOKENIZERS[name].train(config, documents)
    if not pathlib.Path(name).is_file():
        raise UserError(f"data.tokenizer={name!r}: neither a file nor a tokenizer; "
                        + did_you_mean(name, [*TOKENIZERS, "tokenizer.json (a path)"]))
    return HuggingFaceTokenizer(pathlib.Path(name).read_text(), settings_beside(name))


def settings_beside(tokenizer_json: str) -> dict:
    """What tokenizer_config.json of the same folder says of the first token, where there is one."""
    file = pathlib.Path(tokenizer_json).with_name("tokenizer_config.json")
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
        return {key: found[key] for key in ("add_bos_token", "bos_token") if key in found}
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); copy it again") from error


def load_tokenizer(text: str):
    """The inverse of `to_json`."""
    stored = json.loads(text)
    return TOKENIZERS[stored["kind"]](stored["state"])


@TOKENIZERS.register("byte")
class ByteTokenizer:
    """UTF-8 bytes, and one id that ends a document."""

    vocab_size, eos_id = 257, 256

    def __init__(self, state=None):
        pass

    @classmethod
    def train(cls, config, documents):
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        """Of a special token by its name; None: there is no such."""
        return self.eos_id if token == EOS else None

    def to_json(self) -> str:
        return json.dumps({"kind": "byte", "state": None})


@TOKENIZERS.register("char")
class CharTokenizer:
    """The characters that occur in the text, in code-point order. One document: no end token (it would never occur)."""

    eos_id = None

    def __init__(self, state: str):
        self.characters = state
        self.codes = np.frombuffer(state.encode("utf-32-le"), np.uint32)
        self.vocab_size = len(self.codes)

    @classmethod
    def train(cls, config, documents):
        return cls("".join(sorted(set().union(*documents))))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.minimum(np.searchsorted(self.codes, codes), self.vocab_size - 1)
        if len(wrong := np.flatnonzero(self.codes[ids] != codes)):
            raise UserError(f"character {chr(codes[wrong[0]])!r} at {wrong[0]} is not in the tokenizer's vocabulary of "
                            f"{self.vocab_size}; leave it out, or train with data.tokenizer=byte")
        return ids.astype(np.uint32 if self.vocab_size > 2**16 else np.uint16)

    def decode(self, ids) -> str:
        return "".join(self.characters[int(i)] for i in ids)

    def token_id(self, token: str) -> int | None:
        return None

    def to_json(self) -> str:
        return json.dumps({"kind": "char", "state": self.characters})


class HuggingFaceTokenizer:
    """Any tokenizer.json, through the `tokenizers` library.

    A text begins with the ids that the model was trained to see there (<s>, <bos>): those that the file's post-processor puts
    first, unless add_bos_token of tokenizer_config.json (`settings`) says otherwise. What ends a document is the store's.
    """

    def __init__(self, state: str, settings: dict | None = None):
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_str(state)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer: not a tokenizer.json ({error})") from error
        self.vocab_size = self.inner.get_vocab_size()
        ends = [self.inner.token_to_id(t) for t in (EOS, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")]
        self.eos_id = next((i for i in ends if i is not None), None)
        self.inner.no_padding()
        self.inner.no_truncation()  # a document is as long as it is
        if settings and "add_bos_token" in settings and settings["add_bos_token"] is not None:
            self.set_bos(**settings)
        probe = self.inner.encode("a")
        self.first = [i for i, _ in itertools.takewhile(lambda pair: pair[1], zip(probe.ids, probe.special_tokens_mask,
                                                                                  strict=True))]

    def set_bos(self, add_bos_token: bool, bos_token: str | dict | None = None) -> None:
        from tokenizers import processors

        bos = bos_token["content"] if isinstance(bos_token, dict) else bos_token
        if not add_bos_token:
            self.inner.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        elif bos is not None and (bos_id := self.inner.token_to_id(bos)) is not None:
            self.inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])

    def encode(self, text: str) -> np.ndarray:
        ids = self.first + self.inner.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.uint32 if self.vocab_size > 2**16 else np.uint16)

    def decode(self, ids) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    def to_json(self) -> str:
        return json.dumps({"kind": "bpe", "state": self.inner.to_str()})


@TOKENIZERS.register("bpe")
class BPETokenizer(HuggingFaceTokenizer):
    """Byte-level BPE trained on the text (Sennrich et al., arXiv:1508.07909), by the `tokenizers` library."""

    @classmethod
    def train(cls, config, documents):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=config.data.bpe_vocab_size, special_tokens=[EOS], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        inner.train_from_iterator(documents, trainer)
        return cls(inner.to_str())
