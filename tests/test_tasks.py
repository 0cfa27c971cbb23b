"""Tasks: the questions of each file's form, the measures that lm-eval gets, one line for what is no question."""

import json
import math

import numpy as np
import pytest
from data_cases import jsonl, write
from lm_eval_cases import golden, write_tasks
from test_scoring import opened

from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.evaluate.scoring import Item, Score
from jaxlm.evaluate.suite import build_suite, table
from jaxlm.evaluate.tasks import TASKS, bare, estimate, last_number, parse_tasks, strict_number
from jaxlm.train.loop import train


class Oracle:
    """In an evaluator's place: a text's log-likelihood is what `judge` says of (context, continuation); texts that it writes are
    `answers`."""

    def __init__(self, judge=None, answers=()):
        self.judge, self.answers, self.asked = judge, answers, []

    def encode(self, text):
        return [text]

    def encode_pair(self, context, continuation):
        self.asked.append((context, continuation))
        return Item([context, continuation], 1)

    def score(self, params, items):
        return [Score(self.judge(*item.ids), False, 1, False) for item in items]

    def write(self, params, contexts, num_tokens, until):
        assert until == ("Question:", "</s>", "<|im_end|>") and num_tokens == 256
        self.asked += [context for context, in contexts]
        return self.answers

    def room(self, num_tokens):
        return 100


def rows(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def asked_of(config, kind: str, *records, **options) -> list:
    """The pairs that a task of these records asks about."""
    write(config, "task.jsonl", rows(*records))
    oracle = Oracle()
    TASKS[kind](config, oracle, "task.jsonl", **options)
    return oracle.asked


def check(results: dict, wanted: dict) -> None:
    for key, value in wanted.items():
        assert results[key.removesuffix(",none")] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("name", ["gpt2", "llama2"])
def test_measures_are_those_of_lm_eval(name, tmp_path):
    evaluator, params = opened(name)
    config, files, answers = evaluator.config, write_tasks(tmp_path), golden(name)[1]
    found = TASKS["multiple_choice"](config, evaluator, files["tiny_choice"]).run(evaluator, params)
    check(found, answers["tiny_choice"]["results"])
    assert found["n"] == 8 and found["cut"] == 2
    found = TASKS["lambada"](config, evaluator, files["tiny_word"]).run(evaluator, params)
    wanted = dict(answers["tiny_word"]["results"])
    del wanted["perplexity_stderr,none"]  # resampled there
    check(found, wanted)
    if name == "gpt2":  # with <s>, lm-eval also scores <s> after <s>
        found = TASKS["text"](config, evaluator, files["tiny_text"]).run(evaluator, params)
        wanted = dict(answers["tiny_text"]["results"])
        assert math.log2(wanted.pop("byte_perplexity,none")) == pytest.approx(found["bits_per_byte"], rel=1e-6)
        check(found, wanted)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert found["loss"] * found["tokens"] == pytest.approx(-sum(v for _, v in answers["tiny_text"]["samples"]))


def test_hellaswag_asks_as_lm_eval_does(config):
    ready = dict(query="Roof: A man", choices=["sits", "climbs up"], gold=1)
    raw = dict(activity_label="Roof", ctx_a="A man [header] is on a roof.", ctx_b="he",
               endings=["sits [step] down", "is [title] up"], label="1")
    assert asked_of(config, "hellaswag", ready, raw) == [
        ("Roof: A man", " sits"), ("Roof: A man", " climbs up"),
        ("Roof: A man is on a roof. He", " sits down"), ("Roof: A man is on a roof. He", " is.  up".replace("  ", " "))]


def test_arc_and_piqa_ask_as_lm_eval_does(config):
    ready = dict(query="Question: Why?", choices=["a", "b"], gold=0)
    arc = dict(question="Why?", choices=dict(text=["so", "not", "or"], label=["A", "B", "C"]), answerKey="C")
    assert asked_of(config, "arc", ready, arc) == [
        ("Question: Why?\nAnswer:", f" {c}") for c in ("a", "b", "so", "not", "or")]
    ready = dict(query="Question: ice box\n", choices=["a", "b"], gold=0)
    piqa = dict(goal="ice box", sol1="water", sol2="soda", label=0)
    assert asked_of(config, "piqa", ready, piqa) == [
        ("Question: ice box\nAnswer:", f" {c}") for c in ("a", "b", "water", "soda")]


def test_shots_stand_before_each_question_and_are_counted(config):
    write(config, "solved.jsonl", rows(*[dict(query=f"q{i}", choices=["x", "y"], gold=i % 2) for i in range(3)]))
    question = dict(query="q", choices=["a", "b"], gold=0)
    assert asked_of(config, "multiple_choice", question, shots=2, shots_path="solved.jsonl")[0] == ("q0 x\n\nq1 y\n\nq", " a")
    with pytest.raises(UserError, match="solved.jsonl has 3 questions, shots=4"):
        asked_of(config, "multiple_choice", question, shots=4, shots_path="solved.jsonl")
    with pytest.raises(UserError, match="shots=1 needs shots_path"):
        asked_of(config, "multiple_choice", question, shots=1)


def test_lambada_asks_for_the_last_word(config):
    assert asked_of(config, "lambada", dict(text="In my palm is a stone")) == [("In my palm is a", " stone")]


def test_trivial_scorers_land_where_they_must(config):
    """The right choice; the shortest; by length, where acc_norm and acc_bytes tell characters from bytes."""
    records = [dict(query=f"q{i}", choices=["a" * (1 + i % 3), "bb", "éé" * 2], gold=i % 3) for i in range(9)]
    write(config, "task.jsonl", rows(*records))
    right = {(f"q{i}", " " + r["choices"][r["gold"]]) for i, r in enumerate(records)}
    run = lambda judge: (lambda oracle: TASKS["multiple_choice"](config, oracle, "task.jsonl").run(oracle, None))(Oracle(judge))
    best = run(lambda *pair: 0.0 if pair in right else -9.0)
    assert best["acc"] == 1 and best["acc_stderr"] == 0 and best["n"] == 9
    shortest = [min(range(3), key=lambda k: len(r["choices"][k])) == r["gold"] for r in records]
    found = run(lambda context, choice: -float(len(choice)))
    assert found["acc"] == np.mean(shortest) and found["acc_stderr"] == pytest.approx(np.std(shortest, ddof=1) / 3)
    one = run(lambda context, choice: -1.0)  # the longest: most characters, most bytes
    assert one["acc_norm"] == one["acc_bytes"] == 1 / 3
    tie = run(lambda context, choice: -1.5 * len(choice.encode()) + (0.6 if "é" in choice else 0.0) * len(choice))
    assert tie["acc_norm"] != tie["acc_bytes"]


def test_sums_are_right_by_the_number_after_the_marks_or_the_last_one(config):
    records = [dict(question=f"How many {i}?", answer=f"It is <<1>>1.\n#### 1,{i}00") for i in range(4)]
    write(config, "sums.jsonl", rows(*records))
    oracle = Oracle(answers=[" so\n#### 1000", " it is $1,100.", " 7 then #### 1,200 or 9", " none"])
    found = TASKS["gsm8k"](config, oracle, "sums.jsonl").run(oracle, None)
    assert oracle.asked[0] == "Question: How many 0?\nAnswer:"
    assert found["n"] == 4 and found["exact_match"] == 0.5 and found["exact_match_flexible"] == 0.5 and found["cut"] == 0
    assert (strict_number("#### -3.5 #### 4"), strict_number("4"), last_number("a 3, then -4")) == ("-3.5", "[invalid]", "-4")
    assert bare("x\n#### $1,234.") == "1234"


def test_estimates():
    values = [1.0, 0.0, 1.0, 1.0]
    assert estimate("a", values) == {"a": 0.75, "a_stderr": pytest.approx(np.std(values, ddof=1) / 2)}
    assert estimate("a", [2.0]) == {"a": 2.0}
    rng = np.random.default_rng(0)
    nll, tokens = rng.gamma(9.0, 2.0, 4000), rng.integers(5, 15, 4000)
    found = estimate("p", nll, tokens, math.exp)
    again = [(lambda at: math.exp(nll[at].sum() / tokens[at].sum()))(rng.integers(0, 4000, 4000)) for _ in range(300)]
    assert found["p_stderr"] == pytest.approx(np.std(again), rel=0.15)


@pytest.mark.parametrize("kind, record, said", [
    ("multiple_choice", dict(query="a", choices=["b"], gold=0), "choices .two texts or more.*it has query, choices, gold"),
    ("multiple_choice", dict(query="a", choices=["b", "c"], gold=2), "is no question"),
    ("hellaswag", dict(text="a"), "needs activity_label.*it has text"),
    ("arc", dict(question="a", choices=dict(text=["b", "c"], label=["A", "B"]), answerKey="C"), "needs question, choices"),
    ("piqa", dict(goal="a", sol1="b", label=0), "needs goal, sol1, sol2"),
    ("lambada", dict(query="a"), "needs text .two words"),
    ("gsm8k", dict(question="a", answer="b"), "ends in ####"),
])
def test_a_record_that_is_no_question_is_named_by_file_and_line(config, kind, record, said):
    good = dict(query="a", choices=["b", "c"], gold=0, text="a b", question="a", answer="#### 1")
    records = [good, record] if kind in ("multiple_choice", "lambada", "gsm8k") else [record]
    with pytest.raises(UserError, match=rf"task.jsonl:{len(records)}: .*{said}"):
        asked_of(config, kind, *records)


def test_what_cannot_be_read_is_said_or_skipped(config):
    write(config, "task.jsonl", rows(dict(text="a b")) + "{broken\n" + rows(dict(text="c d")))
    with pytest.raises(UserError, match="task.jsonl:2: not JSON"):
        TASKS["lambada"](config, Oracle(), "task.jsonl")
    config.data.on_error = "skip"
    task = TASKS["lambada"](config, Oracle(), "task.jsonl")
    assert len(task.questions) == 2 and task.skipped[0].endswith("task.jsonl:2")
    write(config, "task.txt", "a b\n")
    for path, said in (("none.jsonl", "no such file"), ("task.txt", "is text; a task needs records")):
        with pytest.raises(UserError, match=said):
            TASKS["lambada"](config, Oracle(), path)


def suite_of(config, *entries, **options):
    evaluator, _ = opened("gpt2")
    config.eval.tasks = entries
    config.eval.update(options)
    return build_suite(config, evaluator.model, evaluator.tokenizer, evaluator.mesh)


def test_all_that_is_wrong_with_tasks_is_said_at_once(config):
    write(config, "a.jsonl", rows(dict(text="a b")))
    entries = (("hellaswig", "a.jsonl"), ("lambada", "b.jsonl"), ("lambada", "a.jsonl", {"shot": 1}), ("lambada",),
               ("text", "a.jsonl", {"shots": 1}), ("lambada", "a.jsonl"), ("lambada", "a.jsonl"))
    with pytest.raises(UserError) as raised:
        suite_of(config, *entries)
    said = ("did you mean hellaswag", "no such file", "option shot=1", "is no task; give", "shots=1 is for tasks",
            "two are called 'lambada'")
    assert all(words in problem for words, problem in zip(said, raised.value.problems, strict=True)), raised.value.problems
    with pytest.raises(UserError, match="give KIND:FILE"):
        parse_tasks("hellaswag")
    assert parse_tasks("arc:a.jsonl, wiki=text:b.txt") == (("arc", "a.jsonl"), ("text", "b.txt", {"name": "wiki"}))


def test_each_domain_has_its_loss_and_a_limit_holds(config, capsys):
    write(config, "a.txt", "the old man went to the river")
    write(config, "b.jsonl", jsonl("a dog likes to run", "the cat sleeps", "the bird"))
    suite = suite_of(config, ("text", "a.txt", {"name": "river"}), ("text", "b.jsonl", {"name": "animals"}), task_limit=2)
    results = dict(suite.run(opened("gpt2")[1]))
    assert [result["n"] for result in results.values()] == [1, 2]
    assert "loss_stderr" in results["animals"] and "loss_stderr" not in results["river"]
    bits = results["river"]["loss"] * results["river"]["tokens"] / math.log(2) / 29
    assert results["river"]["bits_per_byte"] == pytest.approx(bits)
    lines = table(results).splitlines()
    assert lines[0].split() == ["task", "measure", "value", "+-", "n"] and lines[1].split()[:2] == ["river", "loss"]
    assert len(lines) == 9
    assert list(suite_of(config, task_limit=0).lines(None, 3)) == []


def test_a_run_measures_tasks_while_it_trains(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question and more of it " * 40)
    (tmp_path / "task.jsonl").write_text(rows(*[dict(query="to be or", choices=["not", "the"], gold=i % 2) for i in range(3)]))
    config = load("configs/default.py", [f"--config.{o}" for o in (
        f"data.root={tmp_path}", "data.path=text.txt", "data.tokenizer=byte", "seq_len=16", "batch_size=8", "steps=2",
        "mesh.data=1", "model.num_layers=1", "model.embed_dim=32", "schedule.warmup_steps=0", "observe.report=False",
        "eval.every_steps=1", f"data.store_dir={tmp_path / 'stores'}", "observe.progress=none",
        "eval.tasks=(('multiple_choice','task.jsonl'),)")])
    train(config, str(tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["split"] == "task/multiple_choice"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["n"] == 3 and line["acc"] in (1 / 3, 2 / 3) and "acc_norm_stderr" in line for line in lines)
