"""Scores of written texts beside right ones, all in percent: BLEU (Papineni et al. 2002) and chrF (Popovic 2015) by sacrebleu,
ROUGE (Lin 2004) by rouge-score. What made a score is told beside it, under "<name>_signature".

A metric takes answers, a list of texts, and references, of each answer one or more right ones; -> {name: number or signature}.
"""

import importlib
import importlib.metadata
import statistics

from jaxlm.errors import UserError
from jaxlm.registry import Registry

METRICS = Registry("text metric", key="eval.text_metrics")


def score(names, answers: list[str], references: list[list[str]]) -> dict:
    """What each of the metrics `names` says. Raises UserError: an unknown name, no answers, or a package that is missing."""
    metrics = [METRICS[name] for name in names]
    if not answers:
        raise UserError("eval.text_metrics: there are no answers to score; give a split with at least one example")
    return {key: value for metric in metrics for key, value in metric(answers, references).items()}


def package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"eval.text_metrics: needs {name.partition('.')[0]} ({error}); pip install 'jaxlm[tasks]'") from error


def of_corpus(name: str, metric, answers, references) -> dict:
    """By a metric of sacrebleu, which wants the first references of all, then the second ones, with None where there is none."""
    most = max(map(len, references))
    streams = [[of[i] if i < len(of) else None for of in references] for i in range(most)]
    found = metric.corpus_score(answers, streams)
    return {name: found.score, f"{name}_signature": str(metric.get_signature())}


@METRICS.register("bleu")
def bleu(answers, references):
    """sacreBLEU of texts as they are: case kept, tokenised by 13a."""
    return of_corpus("bleu", package("sacrebleu.metrics").BLEU(), answers, references)


@METRICS.register("bleu_lowercase")
def bleu_lowercase(answers, references):
    return of_corpus("bleu_lowercase", package("sacrebleu.metrics").BLEU(lowercase=True), answers, references)


@METRICS.register("bleu_zh")
def bleu_zh(answers, references):
    """Chinese characters are words of their own."""
    return of_corpus("bleu_zh", package("sacrebleu.metrics").BLEU(tokenize="zh"), answers, references)


@METRICS.register("chrf")
def chrf(answers, references):
    return of_corpus("chrf", package("sacrebleu.metrics").CHRF(), answers, references)


@METRICS.register("rouge")
def rouge(answers, references):
    """Words, stemmed."""
    scorer = package("rouge_score.rouge_scorer").RougeScorer(ROUGES, use_stemmer=True)
    return mean_of_best("rouge", scorer, "words, Porter stemmer", answers, references)


@METRICS.register("rouge_characters")
def rouge_characters(answers, references):
    """Each character is a word, as for Chinese."""
    scorer = package("rouge_score.rouge_scorer").RougeScorer(ROUGES, tokenizer=Characters())
    return mean_of_best("rouge_characters", scorer, "characters", answers, references)


ROUGES = ("rouge1", "rouge2", "rougeL")


class Characters:
    @staticmethod
    def tokenize(text: str) -> list[str]:
        return list(text)


def mean_of_best(name: str, scorer, words: str, answers, references) -> dict:
    """F1, for each of ROUGE-1, -2 and -L by itself of the reference that it is best with."""
    found = [scorer.score_multi(of, answer) for of, answer in zip(references, answers, strict=True)]
    ending = name.removeprefix("rouge")
    scores = {kind + ending: 100 * statistics.fmean(one[kind].fmeasure for one in found) for kind in ROUGES}
    version = importlib.metadata.version("rouge-score")
    return {**scores, f"{name}_signature": f"F1, {words}, best over references, rouge-score {version}"}
