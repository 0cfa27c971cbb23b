"""Tokenizers: text <-> ids. Each has vocab_size, eos_id and eos_token (or None), encode, decode and to_json."""

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
    return HuggingFaceTokenizer(pathlib.Path(name).read_text())


def load_tokenizer(text: str):
    """The inverse of `to_json`."""
    stored = json.loads(text)
    return TOKENIZERS[stored["kind"]](stored["state"])


@TOKENIZERS.register("byte")
class ByteTokenizer:
    """UTF-8 bytes, and one id that ends a document."""

    vocab_size, eos_id, eos_token = 257, 256, EOS

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

    eos_id = eos_token = None

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
    """Any tokenizer.json, through the `tokenizers` library."""

    def __init__(self, state: str):
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_str(state)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer: not a tokenizer.json ({error})") from error
        self.vocab_size = self.inner.get_vocab_size()
        ends = [self.inner.token_to_id(t) for t in (EOS, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")]
        self.eos_id = next((i for i in ends if i is not None), None)
        self.eos_token = None if self.eos_id is None else self.inner.id_to_token(self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        ids = self.inner.encode(text, add_special_tokens=False).ids
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
