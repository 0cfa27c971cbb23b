"""Log-likelihoods: those of lm-eval with transformers, whatever batch, length, order or mesh; cut as lm-eval cuts texts."""

import functools

import numpy as np
import pytest
from hf_models import golden as hugging_face
from lm_eval_cases import MODELS, golden

from jaxlm.data.tokenizers import ByteTokenizer, CharTokenizer
from jaxlm.errors import UserError
from jaxlm.evaluate.scoring import Evaluator, Item, windows
from jaxlm.huggingface.load import open_source
from jaxlm.train.restore import open_run


@functools.cache
def opened(name: str, *overrides):
    """-> (evaluator, parameters)"""
    run = open_run("", [f"--config.model.from_pretrained={golden(name)[0]}", "--config.eval.batch_size=8",
                        *(overrides or ["--config.mesh.data=1"])], text=False)
    return Evaluator(run.config, run.model, run.data.tokenizer, run.mesh), run.params


def asked(name: str):
    """Every pair that lm-eval asked about -> (arguments, [log-likelihood, greedy])."""
    answers = golden(name)[1]
    return [sample for task in ("tiny_choice", "tiny_word") for sample in answers[task]["samples"]]


@pytest.mark.parametrize("name", MODELS)
def test_each_log_likelihood_is_that_of_lm_eval_with_transformers(name):
    evaluator, params = opened(name)
    scores = evaluator.score(params, [evaluator.encode_pair(*arguments) for arguments, _ in asked(name)])
    assert evaluator.lengths() == [32, 64, 96] and sum(score.cut for score in scores) == 3
    for score, (arguments, (log_likelihood, greedy)) in zip(scores, asked(name), strict=True):
        assert score.log_likelihood == pytest.approx(log_likelihood, rel=1e-6), arguments
        assert score.greedy == greedy


def test_a_long_document_is_scored_in_windows_as_by_lm_eval():
    evaluator, params = opened("gpt2")
    samples = golden("gpt2")[1]["tiny_text"]["samples"]
    scores = evaluator.score(params, [evaluator.encode_document(text) for (text,), _ in samples])
    assert [score.tokens > 96 for score in scores] == [False, False, True, True]
    np.testing.assert_allclose([score.log_likelihood for score in scores], [wanted for _, wanted in samples], rtol=1e-6)


@pytest.mark.parametrize("mesh", [("data=2", "fsdp=2", "tensor=2"), ("data=2", "context=2")], ids=str)
def test_order_and_mesh_change_nothing(mesh):
    evaluator, params = opened("llama2")
    items = [evaluator.encode_pair(*arguments) for arguments, _ in asked("llama2")]
    wanted = evaluator.score(params, items)
    there, params_there = opened("llama2", *(f"--config.mesh.{axis}" for axis in mesh), "--config.mesh.expert=1")
    got = there.score(params_there, items[::-1])[::-1]
    np.testing.assert_allclose([s.log_likelihood for s in got], [s.log_likelihood for s in wanted], rtol=2e-6)
    assert [s[1:] for s in got] == [s[1:] for s in wanted]


def test_greedy_says_that_each_token_is_the_likeliest():
    """By scoring one token at a time, each of which has 96 rivals."""
    evaluator, params = opened("llama2")
    context = evaluator.encode("the old man")
    likeliest = list(context)
    for _ in range(3):
        rivals = evaluator.score(params, [Item([*likeliest, token], len(likeliest)) for token in range(96)])
        assert sum(np.exp(score.log_likelihood) for score in rivals) == pytest.approx(1, abs=1e-5)
        assert [score.greedy for score in rivals].count(True) == 1
        likeliest.append(int(np.argmax([score.log_likelihood for score in rivals])))
        assert rivals[likeliest[-1]].greedy
    other = [*likeliest[:-2], (likeliest[-2] + 1) % 96, likeliest[-1]]
    whole = evaluator.score(params, [Item(likeliest, len(context)), Item(other, len(context))])
    assert [score.greedy for score in whole] == [True, False]


def test_what_is_written_is_what_lm_eval_gets_from_transformers():
    for name in MODELS:
        evaluator, params = opened(name)
        samples = golden(name)[1]["tiny_sums"]["samples"]
        contexts = [evaluator.encode(arguments[0]) for arguments, _ in samples]
        assert evaluator.write(params, contexts, 24, ("#", "zq")) == [text for _, text in samples]
        first = samples[0][1]
        assert evaluator.write(params, contexts, 24, (first[5:8],))[0] == first[: first.index(first[5:8])]
        assert evaluator.write(params, [], 24) == []


def test_windows_score_each_token_once_after_as_much_as_there_is_room_for():
    for length, first, room in ((5, 1, 8), (9, 1, 8), (10, 1, 8), (40, 1, 8), (20, 15, 8), (40, 10, 8), (4, 4, 8)):
        scored = []
        for tokens, targets in windows(Item(list(range(length)), first), room):
            assert 0 < targets < len(tokens) <= room + 1
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens))) and (len(tokens) == room + 1 or tokens[0] == 0)
            scored += tokens[-targets:]
        assert scored == list(range(first, length))


def test_pairs_are_cut_as_lm_eval_cuts_them():
    gpt2, llama = opened("gpt2")[0], opened("llama2")[0]
    plain = lambda text: list(gpt2.tokenizer.inner.encode(text, add_special_tokens=False).ids)
    assert gpt2.prefix == [0] and llama.prefix == [1]
    assert llama.encode("<s>the cat") == llama.encode("the cat") == [1, *plain("the cat")]  # a chat template has written it
    for evaluator, first in ((gpt2, []), (llama, [1])):
        context = [*first, *plain("the old man")]
        assert evaluator.encode_pair("the old man", " saw") == ([*context, *plain(" saw")], len(context))
        assert evaluator.encode_pair("the old man  ", "saw") == ([*context, *plain("  saw")], len(context))
        assert evaluator.encode_pair("the old man", "") == (context, len(context))
        assert evaluator.encode_pair("", "the cat") == (evaluator.prefix + plain("the cat"), 1)
        assert evaluator.encode_pair(" ", "the cat") == (evaluator.prefix + plain(" the cat"), 1)
        assert evaluator.encode_document("<|endoftext|>a" if not first else "<s>a") == (evaluator.prefix + plain("a"), 1)


def with_tokenizer(tokenizer) -> Evaluator:
    evaluator = opened("gpt2")[0]
    return Evaluator(evaluator.config, evaluator.model, tokenizer, evaluator.mesh)


def test_a_continuation_that_melts_into_its_context_is_still_scored():
    class Pairs(ByteTokenizer):
        def encode(self, text):
            return [ord(c) for c in text.replace("ab", "X")]

    evaluator = with_tokenizer(Pairs())
    assert evaluator.encode_pair("ca", "b") == (evaluator.encode("cX"), 1)
    assert evaluator.encode_pair("ca", "bd") == ([*evaluator.encode("ca"), ord("d")], 2)  # as lm-eval has it


def test_a_text_begins_after_the_end_token_or_gives_its_first_token_away():
    evaluator, params = opened("gpt2")
    assert with_tokenizer(ByteTokenizer()).encode_document("ab") == ([256, 97, 98], 1)
    assert with_tokenizer(CharTokenizer("abc")).encode_document("ab") == ([0, 1], 1)
    assert evaluator.encode_document("") == ([0], 1)
    assert evaluator.score(params, [evaluator.encode_document("")]) == [(0.0, True, 0, False)]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_encoders_are_refused(name):
    config = open_source(hugging_face(name)[0]).config
    with pytest.raises(UserError, match=f"model.family='{config.model.family}'.*only model.family=decoder"):
        Evaluator(config, None, ByteTokenizer(), None)
