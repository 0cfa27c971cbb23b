"""`jaxlm generate`: prompts in, texts out, on the terminal or as JSON lines."""

import json
import re
import sys

from jaxlm.errors import UserError
from jaxlm.generate.beam import BeamSearch
from jaxlm.generate.decoding import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.text import Text
from jaxlm.parallel.distributed import is_main


def show(text: str, end: str = "") -> None:
    if is_main():
        print(text, end=end, flush=True)


def stop_ids(tokenizer, names: list[str]) -> frozenset:
    """Ids of the end of a text and of these tokens. Raises UserError: the tokenizer has no such token."""
    ids, problems = {tokenizer.eos_id} - {None}, []
    for name in names:
        token = tokenizer.token_id(name)
        if token is None:
            problems.append(f"--stop_token={name}: this tokenizer has no such token; for text that may be several, use --stop")
        ids.add(token)
    if problems:
        raise UserError(*problems)
    return frozenset(ids)


class Written:
    """What has come of one prompt. shown: what stands before it; None: the prompt."""

    def __init__(self, prompt: str, tokenizer, stop: tuple, ends: frozenset, shown: str | None = None):
        self.prompt, self.shown = prompt, prompt if shown is None else shown
        self.ends, self.inner, self.done = ends, Text(tokenizer, stop), False
        self.text, self.tokens, self.log_probability = "", 0, 0.0

    def add(self, token) -> str:
        """-> what is new of the text."""
        new = "" if token.id in self.ends else self.inner.add(token.id)
        if token.last and not self.inner.stopped:
            new += self.inner.finish()
        self.tokens, self.log_probability = self.tokens + 1, self.log_probability + token.log_probability
        self.text, self.done = self.text + new, token.last or self.inner.stopped
        return new

    def line(self, as_json: bool) -> str:
        if not as_json:
            return self.shown + self.text
        return json.dumps({"prompt": self.prompt, "text": self.text, "tokens": self.tokens,
                           "log_probability": self.log_probability}, ensure_ascii=False)


def write(run, prompts: list[str], num_tokens: int, options: Sampling, *, seed: int = 0, stop: tuple = (),
          stop_tokens: tuple = (), beams: int = 1, length_penalty: float = 1.0, as_json: bool = False) -> None:
    """Write on from each prompt, or, with data.form=pair or an encoder-decoder, answer it: one prompt's text as it comes, several
    text by text as they end. A prompt fills the one field that data.prompt has.

    Raises UserError: a prompt or an option that cannot be served.
    """
    tokenizer, ends = run.data.tokenizer, stop_ids(run.data.tokenizer, stop_tokens)
    data, asked = run.config.data, Prompts(run.config, tokenizer, num_tokens)
    fields = re.findall(r"\{[^{}]+\}", data.prompt) if data.form == "pair" else []
    full = lambda prompt: data.prompt.replace(fields[0], prompt) if len(fields) == 1 else prompt
    requests = [asked.request(full(prompt), options, seed + i, ends) for i, prompt in enumerate(prompts)]
    if is_main() and asked.num_cut:
        print(f"jaxlm: {asked.about_cut(len(prompts))}", file=sys.stderr)
    generator = Generator(run.model, tokenizer.vocab_size, run.config.seq_len, data.source_len)
    texts = [Written(prompt, tokenizer, stop, ends, None if asked.room is None else "") for prompt in prompts]
    if beams > 1:
        found = BeamSearch(generator, beams, length_penalty).search(run.params, requests)
        for written, request, (best, *_) in zip(texts, requests, found, strict=True):
            written.text, written.tokens = tokenizer.decode(best.ids), len(best.ids)
            written.log_probability = best.score * (len(best.ids) + (len(best.ids) < request.num_tokens)) ** length_penalty
            show(written.line(as_json), "\n")
        return
    live = len(prompts) == 1 and not as_json
    show(texts[0].shown if live else "")
    for token in generator.stream(run.params, requests):
        written = texts[token.request]
        if written.done:  # by a stop string, which the generator does not know of
            continue
        new = written.add(token)
        show(new if live else written.line(as_json) + "\n" if written.done else "")
        if all(written.done for written in texts):
            break
    show("\n" if live else "")
