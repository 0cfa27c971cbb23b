"""Answers to the prompts of a split (data.form=pair), written by beam search or greedily, and scored beside the right ones."""

import itertools
import json
import os
import time
from typing import NamedTuple

import numpy as np

from jaxlm.data.examples import Pair, filled, references
from jaxlm.data.loader import deal
from jaxlm.data.sources import Skipped, find_files, read_items, reading, whole_files
from jaxlm.data.splits import cut_splits
from jaxlm.errors import UserError
from jaxlm.evaluate.evaluation import EVALUATIONS
from jaxlm.evaluate.text_metrics import METRICS, score
from jaxlm.generate.beam import BeamSearch
from jaxlm.generate.decoding import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from jaxlm.parallel.distributed import is_main

AT_ONCE = 32  # texts written side by side


class Asked(NamedTuple):
    prompt: str
    references: list  # right answers, at least one


class Answers:
    """Of a split's first examples, `limit` of them or, where that is 0, all. Raises UserError: what cannot be read or asked."""

    def __init__(self, config, model, data, split: str, limit: int = 0):
        e, tokenizer = config.eval, data.tokenizer
        for name in e.text_metrics:
            METRICS[name]
        self.metrics, self.tokenizer = e.text_metrics, tokenizer
        self.asked = read_split(config, data, split)[: limit or None]
        self.prompts = Prompts(config, tokenizer, e.max_new_tokens)
        stop = frozenset({tokenizer.eos_id} - {None})
        self.requests = [self.prompts.request(asked.prompt, Sampling(temperature=0.0), stop=stop) for asked in self.asked]
        self.generator = Generator(model, tokenizer.vocab_size, config.seq_len, config.data.source_len)
        self.search = BeamSearch(self.generator, e.beams, e.length_penalty) if e.beams > 1 else None

    def write(self, params) -> list[str]:
        """-> an answer to each prompt."""
        if self.search:
            ids = [found[0].ids for found in self.search.search(params, self.requests, AT_ONCE)]
        else:
            ids = [[] for _ in self.requests]
            order = sorted(range(len(ids)), key=lambda i: len(self.requests[i].source or self.requests[i].prompt))
            for token in self.generator.stream(params, [self.requests[i] for i in order], AT_ONCE):
                if token.id not in self.requests[0].stop:
                    ids[order[token.request]].append(token.id)
        return [self.tokenizer.decode(of).strip() for of in ids]

    def score(self, answers: list[str]) -> dict:
        return score(self.metrics, answers, [asked.references for asked in self.asked])


def read_split(config, data, split: str) -> list[Asked]:
    """The prompts and right answers of a split's records, in their order."""
    d, settings = config.data, reading(config)
    if d.mixture:
        raise UserError("eval.text_metrics: needs the records of one source, data.mixture has several; evaluate with data.path")
    key = {"valid": "valid_path", "test": "test_path"}[split]
    whole = "" if split == "valid" and d.folds else getattr(d, key)
    files = find_files(config, whole or d.path, f"data.{key}" if whole else "data.path")
    form, skipped = Pair(settings, None), Skipped()

    def take(record):
        form.take(record)  # what the store left out is left out here
        record = {d.text_field: record} if isinstance(record, str) else record
        return Asked(filled(d.prompt, record, "prompt"), [text for text in references(d.target, record) if text.strip()])

    asked = [item for extent in whole_files(settings, files) for _, item in read_items(settings, extent, skipped, take)]
    if whole:
        return asked
    if d.folds:
        return [asked[i] for i in np.flatnonzero(deal(data.valid.rows.store, d.folds) == d.fold)]
    held_out = cut_splits(config, [(0, 0, len(asked))], 1)["valid"]
    return list(itertools.chain(*(asked[first:stop] for _, first, stop in held_out)))


@EVALUATIONS.register("pair")
def evaluate_answers(run, split: str, workdir: str, say) -> dict:
    """What eval.text_metrics say. The answers are kept in `workdir`/predictions-<split>.jsonl."""
    if not run.config.eval.text_metrics:
        return {}
    answers, began = Answers(run.config, run.model, run.data, split), time.perf_counter()
    say(answers.prompts.about_cut(len(answers.asked)))
    written = answers.write(run.params)
    seconds = time.perf_counter() - began
    if workdir and is_main():
        with open(os.path.join(workdir, f"predictions-{split}.jsonl"), "w") as out:
            for asked, answer in zip(answers.asked, written, strict=True):
                out.write(json.dumps({"prompt": asked.prompt, "answer": answer, "references": asked.references},
                                     ensure_ascii=False) + "\n")
    return {**answers.score(written), "answers": len(written), "cut_prompts": answers.prompts.num_cut, "answer_seconds": seconds}
