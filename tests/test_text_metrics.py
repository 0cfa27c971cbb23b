"""Scores are those of sacrebleu and rouge-score called directly, and what cannot be scored is said."""

import statistics

import pytest

from jaxlm.errors import UserError
from jaxlm.evaluate.text_metrics import METRICS, score

ANSWERS = ["A man runs through the snow.", "two dogs are playing", "the cats sat"]
REFERENCES = [["A man is running in the snow.", "A man runs through snow."], ["Two dogs play."],
              ["The cat sits on a mat.", "cats sat"]]
CHINESE = ["基于平方和的控制器设计", "一种新的 方法"]
TITLES = [["一种基于平方和优化的控制器设计方法"], ["新方法", "一种新的方法"]]


def test_bleu_and_chrf_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    streams = [[of[0] for of in REFERENCES], [of[1] if len(of) > 1 else None for of in REFERENCES]]
    got = score(("bleu", "bleu_lowercase", "chrf"), ANSWERS, REFERENCES)
    assert got["bleu"] == sacrebleu.corpus_bleu(ANSWERS, streams).score
    assert got["bleu_lowercase"] == sacrebleu.corpus_bleu(ANSWERS, streams, lowercase=True).score != got["bleu"]
    assert got["chrf"] == sacrebleu.corpus_chrf(ANSWERS, streams).score
    assert f"version:{sacrebleu.__version__}" in got["bleu_signature"] and "case:lc" in got["bleu_lowercase_signature"]
    assert score(("bleu_zh",), CHINESE, TITLES[:1] * 2)["bleu_zh"] == sacrebleu.corpus_bleu(
        CHINESE, [[TITLES[0][0]] * 2], tokenize="zh").score
    perfect = score(("bleu", "chrf"), [of[0] for of in REFERENCES], REFERENCES)
    assert perfect["bleu"] == pytest.approx(100) == perfect["chrf"]


def test_rouge_is_that_of_rouge_score_with_the_best_of_several_references():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    got = score(("rouge",), ANSWERS, REFERENCES)
    for kind in kinds:
        best = [max(scorer.score(one, answer)[kind].fmeasure for one in of)
                for answer, of in zip(ANSWERS, REFERENCES, strict=True)]
        assert got[kind] == pytest.approx(100 * statistics.fmean(best))
    assert score(("rouge",), ANSWERS, [of[:1] for of in REFERENCES])["rouge1"] < got["rouge1"]


def test_rouge_by_characters_counts_by_hand():
    pytest.importorskip("rouge_score")
    got = score(("rouge_characters",), ["新的方法"], [["新方法"]])
    assert got["rouge1_characters"] == pytest.approx(100 * 2 * 3 / 7)  # 3 of 4 and of 3 characters
    assert got["rouge2_characters"] == pytest.approx(100 * 2 * 1 / 5)
    assert got["rougeL_characters"] == got["rouge1_characters"]
    assert score(("rouge_characters",), CHINESE, TITLES)["rouge1_characters"] > score(("rouge",), CHINESE, TITLES)["rouge1"] == 0


def test_what_cannot_be_scored():
    with pytest.raises(UserError, match="eval.text_metrics='blue': unknown text metric; did you mean bleu"):
        score(("blue",), ["a"], [["a"]])
    with pytest.raises(UserError, match="no answers to score"):
        score(("bleu",), [], [])
    assert {"bleu", "bleu_lowercase", "chrf", "rouge", "rouge_characters"} <= set(METRICS)
