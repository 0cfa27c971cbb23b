"""Tokenizers: text <-> ids. Those of files (tokenizer.json, .model, vocab.txt, a folder) are opened by `tokenizer_files`."""

import base64
import collections
import io
import itertools
import json
import os
from collections.abc import Iterable

import numpy as np

from jaxlm.errors import UserError
from jaxlm.registry import Registry, did_you_mean

TOKENIZERS = Registry("tokenizer", key="data.tokenizer")
EOS = "<|endoftext|>"
ETX = "\x03"


def build_tokenizer(config, documents: Iterable[str]):
    """From config.data.tokenizer: a registered name, or the path of a file or folder. `documents` are what it may learn from
    (all splits: an id must exist for every character that occurs); they are read once, one at a time."""
    name = config.data.tokenizer
    if name in TOKENIZERS:
        return TOKENIZERS[name].train(config, documents)
    if not os.path.exists(name):
        raise UserError(f"data.tokenizer={name!r}: neither a file nor a tokenizer; "
                        + did_you_mean(name, [*TOKENIZERS, "tokenizer.json (a path)"]))
    from jaxlm.data.tokenizer_files import open_tokenizer

    return open_tokenizer(name)


def learns(config) -> bool:
    """Whether the tokenizer is made of the text."""
    name = config.data.tokenizer
    return name in TOKENIZERS and TOKENIZERS[name].learns


def closed(config) -> bool:
    """Whether there is no id for what the text that it was made of did not have."""
    name = config.data.tokenizer
    return name in TOKENIZERS and TOKENIZERS[name].closed


def load_tokenizer(text: str):
    """The inverse of `to_json`."""
    stored = json.loads(text)
    tokenizer = TOKENIZERS[stored["kind"]](stored["state"])
    tokenizer.chat_template, tokenizer.first = stored["chat_template"], stored["first"]
    return tokenizer


class Tokenizer:
    """What each has: vocab_size, eos_id and its name eos_token (ends a document; None: it has none), encode, decode, kind, state.

    first: ids that every text begins with, because the model was trained to see them there (<s>, <bos>).
    """

    first: list = []
    learns = False  # train() reads the documents
    closed = False  # can write only what it was made of: it is made of the test split too
    chat_template = ""  # Jinja text that makes a conversation one text, where the tokenizer came with one

    @classmethod
    def train(cls, config, documents: Iterable[str]):
        raise UserError(f"data.tokenizer={config.data.tokenizer}: is not made of text; give the path of its file")

    def encode_batch(self, texts: list[str]) -> list:
        """The ids of each text; in parallel where the tokenizer can."""
        return [self.encode(text) for text in texts]

    def token_id(self, token: str) -> int | None:
        """Of a special token by its name; None: there is no such."""
        return None

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "state": self.state, "chat_template": self.chat_template, "first": self.first})


@TOKENIZERS.register("byte")
class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and one id that ends a document."""

    kind, state, vocab_size, eos_id, eos_token = "byte", None, 257, 256, EOS

    def __init__(self, state=None):
        pass

    @classmethod
    def train(cls, config, documents):
        return cls()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)

    def decode(self, ids, special: bool = False) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        return self.eos_id if token == EOS else None


@TOKENIZERS.register("char")
class CharTokenizer(Tokenizer):
    """The characters that occur in the text, in code-point order. Of text: no end token (one document has none); of
    examples: U+0003, "end of text"."""

    kind, learns, closed = "char", True, True

    def __init__(self, state: str):
        self.state = state
        self.codes = np.frombuffer(state.encode("utf-32-le"), np.uint32)
        self.vocab_size = len(self.codes)
        self.eos_id, self.eos_token = (state.index(ETX), ETX) if ETX in state else (None, None)

    @classmethod
    def train(cls, config, documents):
        characters = set() if config.data.form == "text" else {ETX}
        for document in documents:
            characters.update(document)
        return cls("".join(sorted(characters)))

    def encode(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.minimum(np.searchsorted(self.codes, codes), self.vocab_size - 1)
        if len(wrong := np.flatnonzero(self.codes[ids] != codes)):
            raise UserError(f"character {chr(codes[wrong[0]])!r} at {wrong[0]} is not in the tokenizer's vocabulary of "
                            f"{self.vocab_size}; leave it out, or train with data.tokenizer=byte")
        return ids.astype(np.uint32 if self.vocab_size > 2**16 else np.uint16)

    def decode(self, ids, special: bool = False) -> str:
        return "".join(self.state[int(i)] for i in ids if special or int(i) != self.eos_id)

    def token_id(self, token: str) -> int | None:
        return self.eos_id if token == self.eos_token else None


@TOKENIZERS.register("word")
class WordTokenizer(Tokenizer):
    """What stands between blanks, and a token at the end of each line: text that was cut into words before, such as WikiText's.
    In the order of frequency."""

    kind, eos_id, eos_token, learns, closed, line_end = "word", None, None, True, True, "<eos>"

    def __init__(self, state: str):
        self.state = state
        self.words = state.split("\n")
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.vocab_size = len(self.words)

    @classmethod
    def train(cls, config, documents):
        counts = collections.Counter()
        for document in documents:
            counts.update(word for line in lines_of(document) for word in (*line.split(), cls.line_end))
        return cls("\n".join(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))))

    def encode(self, text: str) -> np.ndarray:
        words = [word for line in lines_of(text) for word in (*line.split(), self.line_end)]
        if text and not text.endswith("\n"):
            words.pop()
        try:
            return np.array([self.ids[word] for word in words], np.uint32 if self.vocab_size > 2**16 else np.uint16)
        except KeyError as error:
            raise UserError(f"word {error} is not in the tokenizer's vocabulary of {self.vocab_size:,}; write <unk>, or train "
                            "with data.tokenizer=bpe") from error

    def decode(self, ids, special: bool = False) -> str:
        text = " ".join("\n" if self.words[int(i)] == self.line_end else self.words[int(i)] for i in ids)
        return text.replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")


def lines_of(text: str) -> list[str]:
    """Without the empty one after a last line end."""
    return text.removesuffix("\n").split("\n") if text else []


@TOKENIZERS.register("huggingface")
class HuggingFaceTokenizer(Tokenizer):
    """Any tokenizer.json, through the `tokenizers` library."""

    kind = "huggingface"

    def __init__(self, state: str):
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_str(state)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer: not a tokenizer.json ({error})") from error
        self.inner.no_truncation()
        self.inner.no_padding()
        self.vocab_size = 1 + max(self.inner.get_vocab().values(), default=-1)  # ids may have gaps
        ends = [self.inner.token_to_id(t) for t in (EOS, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")]
        self.eos_id = next((i for i in ends if i is not None), None)
        self.eos_token = None if self.eos_id is None else self.inner.id_to_token(self.eos_id)
        probe = self.inner.encode("a")
        pairs = zip(probe.ids, probe.special_tokens_mask, strict=True)
        self.first = [i for i, special in itertools.takewhile(lambda pair: pair[1], pairs)]

    def encode(self, text: str) -> np.ndarray:
        ids = self.first + self.inner.encode(text, add_special_tokens=False).ids
        return np.array(ids, np.uint32 if self.vocab_size > 2**16 else np.uint16)

    def encode_batch(self, texts: list[str]) -> list:
        return [self.first + encoding.ids for encoding in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids, special: bool = False) -> str:
        """special: special tokens are shown too."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=not special)

    def token_id(self, token: str) -> int | None:
        return self.inner.token_to_id(token)

    @property
    def state(self) -> str:
        return self.inner.to_str()


@TOKENIZERS.register("bpe")
class BPETokenizer(HuggingFaceTokenizer):
    """Byte-level BPE trained on the text (Sennrich et al., arXiv:1508.07909), by the `tokenizers` library."""

    learns = True

    @classmethod
    def train(cls, config, documents):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.train_from_iterator(documents, trainers.BpeTrainer(
            vocab_size=config.data.bpe_vocab_size, special_tokens=[EOS, *config.data.special_tokens], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return cls(inner.to_str())


@TOKENIZERS.register("sentencepiece")
class SentencePieceTokenizer(Tokenizer):
    """A .model of Google's SentencePiece, by its own library. state: the file, in base64."""

    kind = "sentencepiece"

    def __init__(self, state: str):
        from jaxlm.data.formats import optional

        sentencepiece = optional("sentencepiece", ".model")
        self.state = state
        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(state))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"data.tokenizer: not a SentencePiece .model ({error})") from error
        self.vocab_size = self.inner.get_piece_size()
        self.eos_id = None if self.inner.eos_id() < 0 else self.inner.eos_id()
        self.eos_token = None if self.eos_id is None else self.inner.id_to_piece(self.eos_id)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.first + self.inner.encode(text), np.uint32 if self.vocab_size > 2**16 else np.uint16)

    def encode_batch(self, texts: list[str]) -> list:
        return [self.first + ids for ids in self.inner.encode(texts, num_threads=1)]

    def token_id(self, token: str) -> int | None:
        i = self.inner.piece_to_id(token)
        return None if i == self.inner.unk_id() and token != self.inner.id_to_piece(i) else i

    def decode(self, ids, special: bool = False) -> str:
        """special: control pieces such as </s>, which stand for no text, are shown too."""
        ids, out, run = [int(i) for i in ids], [], []
        if not special:
            return self.inner.decode(ids)
        for i in ids:
            if self.inner.is_control(i):
                out += [self.inner.decode(run), self.inner.id_to_piece(i)]
                run = []
            else:
                run.append(i)
        return "".join([*out, self.inner.decode(run)])


@TOKENIZERS.register("unigram")
class UnigramTokenizer(SentencePieceTokenizer):
    """A unigram language model trained on the text (Kudo, arXiv:1804.10959), by SentencePiece: unlike that of `tokenizers`, its
    training gives the same model each time. What is in no piece becomes bytes, so every text comes back as it was, but for
    U+2581, which stands for the space."""

    learns = True

    @classmethod
    def train(cls, config, documents):
        from jaxlm.data.formats import optional

        sentencepiece, model = optional("sentencepiece", "data.tokenizer=unigram:"), io.BytesIO()
        sentencepiece.set_random_generator_seed(0)  # of the lines it takes, where there are more than it wants
        lines = (line for document in documents for line in document.splitlines())
        lines = (line[i : i + 1024] for line in lines for i in range(0, len(line), 1024))
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines, model_writer=model, model_type="unigram", vocab_size=config.data.bpe_vocab_size,
                byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
                allow_whitespace_only_pieces=True, unk_id=0, eos_id=1, eos_piece=EOS, bos_id=-1, pad_id=-1,
                user_defined_symbols=list(config.data.special_tokens), hard_vocab_limit=False, input_sentence_size=1_000_000,
                num_threads=8,  # part of the result: sums are taken thread by thread
                minloglevel=2)
        except RuntimeError as error:
            raise UserError(f"data.tokenizer=unigram: training failed ({error}); change data.bpe_vocab_size, or give more "
                            "text") from error
        return cls(base64.b64encode(model.getvalue()).decode())
