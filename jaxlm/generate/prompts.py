"""A prompt as a run's training had it: what the encoder reads, or what is gone on from."""

from jaxlm.errors import UserError
from jaxlm.generate.decoding import Request
from jaxlm.generate.sampling import Sampling


class Prompts:
    """Makes requests of texts.

    With data.form=pair, and of an encoder-decoder, a text that is longer than its room loses its end, as in training, and
    counts in `num_cut`; an answer has room for what the context leaves, half of it at least. Elsewhere a text stays whole.
    num_tokens: of an answer, at most; 0: as many as there is room for.
    """

    def __init__(self, config, tokenizer, num_tokens: int = 0):
        self.tokenizer, self.seq_len, self.num_cut = tokenizer, config.seq_len, 0
        self.num_tokens, self.has_source = num_tokens or config.seq_len, config.model.family == "encoder_decoder"
        if self.has_source:
            start, self.ending = config.model.decoder_start, [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            self.start = tokenizer.eos_id if start < 0 else start
            self.room = config.data.source_len - len(self.ending)
        else:
            self.room = config.seq_len - min(self.num_tokens, config.seq_len // 2) if config.data.form == "pair" else None

    def request(self, text: str, options: Sampling, seed: int = 0, stop: frozenset = frozenset()) -> Request:
        ids = [int(i) for i in self.tokenizer.encode(text)]
        if self.room is None:
            return Request(ids, self.num_tokens, options, seed, stop)
        self.num_cut += len(ids) > self.room
        ids = ids[: self.room]
        source = ids + self.ending if self.has_source and ids else ids if self.has_source else None
        ids = [self.start] if self.has_source else ids
        return Request(ids, min(self.num_tokens, self.seq_len - len(ids)), options, seed, stop, source)

    def about_cut(self, total: int) -> str:
        """A line for whoever asked; empty where nothing was cut."""
        if not self.num_cut:
            return ""
        key = "data.source_len" if self.has_source else "seq_len"
        return (f"{self.num_cut:,} of {total:,} prompts lost their end: there is room for {self.room} tokens; raise {key} if "
                "the model can take more")


def sample_ids(prompt: str, tokenizer) -> list[int]:
    """Of eval.sample_prompt. Raises UserError: the tokenizer makes nothing of it."""
    try:
        ids = list(tokenizer.encode(prompt))
    except UserError as error:
        raise UserError(f"eval.sample_prompt={prompt!r}: {error}; or set eval.sample_tokens=0") from error
    if not ids:
        raise UserError(f"eval.sample_prompt={prompt!r}: is no token; give some text, or eval.sample_tokens=0")
    return ids
