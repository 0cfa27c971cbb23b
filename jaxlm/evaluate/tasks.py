"""Tasks: questions read from files, and what share of them a model answers rightly. Prompts and measures are those of
lm-evaluation-harness (EleutherAI, version 0.4.13) for the task of that name.

A task is made once, its questions cut into tokens then; `run` asks them of the parameters it is given.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxlm.data.formats import UNREADABLE, Bad, Broken, Extent, format_of
from jaxlm.data.sources import find_files, read_records
from jaxlm.errors import UserError
from jaxlm.registry import Registry

TASKS = Registry("task", key="eval.tasks")


def estimate(name: str, values, weights=None, scale=lambda ratio: ratio) -> dict:
    """{name, name_stderr} of sum(values) / sum(weights), the mean where there are no weights. The standard error is that of a
    ratio of sums over questions drawn at random; of a single one there is none. scale: of the ratio, what is told."""
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    n, ratio = len(values), values.sum() / weights.sum()
    found = {name: float(scale(ratio))}
    if n > 1:
        error = math.sqrt(n / (n - 1) * np.square(values - ratio * weights).sum()) / weights.sum()
        slope = (scale(ratio + 1e-6) - scale(ratio - 1e-6)) / 2e-6
        found[f"{name}_stderr"] = float(abs(slope) * error)
    return found


def as_perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))


class Choices(NamedTuple):
    context: str
    choices: list  # of strings
    gold: int  # which of them is right

    @property
    def solved(self) -> str:
        """As an example for other questions."""
        return f"{self.context} {self.choices[self.gold]}"

    def is_sound(self) -> bool:
        return (isinstance(self.context, str) and len(self.choices) > 1 and 0 <= self.gold < len(self.choices)
                and all(isinstance(choice, str) and choice for choice in self.choices))


class Answer(NamedTuple):
    context: str
    answer: str  # what follows, with the blank before it

    @property
    def solved(self) -> str:
        return self.context + self.answer

    def is_sound(self) -> bool:
        return isinstance(self.context, str) and bool(self.answer.strip())


class Task:
    """Questions: one of each record of a file. A subclass says in `question` how one is made, or raises KeyError, TypeError,
    ValueError, IndexError or AttributeError where the record has not got what it `needs`.

    Args:
        path: as data.path. limit: so many questions, from the start; 0: all.
        shots, shots_path: so many solved ones, the first of that file, stand before each question.
    Raises UserError: no such file; a record that is no question of the task (file, line, remedy).
    """

    needs = ""

    def __init__(self, config, evaluator, path: str, limit: int = 0, shots: int = 0, shots_path: str = ""):
        self.skipped = []
        questions = self.read(config, path, limit)
        if not questions:
            raise UserError(f"eval.tasks: {path} has no questions; give a file that has")
        if shots and not shots_path:
            raise UserError(f"eval.tasks: {path}: shots={shots} needs shots_path, a file of solved questions that are not asked")
        examples = self.read(config, shots_path, shots) if shots else []
        if len(examples) < shots:
            raise UserError(f"eval.tasks: {shots_path} has {len(examples)} questions, shots={shots}; ask for fewer")
        before = "".join(f"{example.solved}\n\n" for example in examples)
        self.questions = [question._replace(context=before + question.context) for question in questions]
        self.prepare(evaluator)

    def read(self, config, path: str, limit: int) -> list:
        found = []
        for where, fields in records_of(config, path, self.skipped):
            try:
                question = self.question(fields)
                sound = question.is_sound()
            except (KeyError, TypeError, ValueError, IndexError, AttributeError):
                sound = False
            if not sound:
                raise UserError(f"{where}: is no question of this task, which needs {self.needs}; it has "
                                f"{', '.join(map(str, fields)) or 'no fields'}: mend it, or choose the task of its form")
            found.append(question)
            if len(found) == limit:
                break
        return found


def records_of(config, path: str, skipped: list):
    """(where, fields) of each record."""
    for file in find_files(config, path, "eval.tasks"):
        try:
            for number, item in format_of(file).read(config, Extent(file)):
                if isinstance(item, dict):
                    yield f"{file}:{number}", item
                elif not isinstance(item, Bad):
                    raise UserError(f"{file}: is text; a task needs records with fields: give .jsonl, .csv, .tsv or .parquet")
                elif config.data.on_error == "skip":
                    skipped.append(f"{file}:{number}")
                else:
                    raise UserError(f"{file}:{number}: {item}")
        except (Broken, *UNREADABLE) as error:
            raise UserError(f"{file}: cannot be read on ({error}); fetch it again") from error


# ---- Which tasks -------------------------------------------------------------------------------------------------------------


def split_entry(entry) -> tuple[str, str, dict]:
    """("gsm8k", "gsm8k/test.jsonl", {"shots": 5, "shots_path": "gsm8k/train.jsonl"}) -> (kind, path, options)."""
    known = {"name": str, "shots": int, "shots_path": str}
    if not (isinstance(entry, (tuple, list)) and len(entry) in (2, 3) and all(isinstance(part, str) for part in entry[:2])):
        raise UserError(f"eval.tasks: {entry!r} is no task; give (kind, path) or (kind, path, {{'name': ..., 'shots': ...}})")
    options = dict(entry[2]) if len(entry) == 3 else {}
    for key, value in options.items():
        if key not in known or type(value) is not known[key]:
            raise UserError(f"eval.tasks: {entry[0]}: option {key}={value!r}; there are name (text), shots (number) and "
                            "shots_path (text)")
        if key != "name" and entry[0] == "text":
            raise UserError(f"eval.tasks: text: {key}={value!r} is for tasks with questions; remove it")
    return *entry[:2], options


def parse_tasks(text: str) -> tuple:
    """ "hellaswag:a.jsonl,wiki=text:b.txt" -> entries of eval.tasks."""
    entries = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        label, colon, path = part.partition(":")
        name, equals, kind = label.rpartition("=")
        if not (colon and path and kind):
            raise UserError(f"--tasks={part}: give KIND:FILE, or NAME=KIND:FILE; kinds are {', '.join(TASKS)}")
        entries.append((kind, path, {"name": name}) if equals else (kind, path))
    return tuple(entries)


# ---- Multiple choice ---------------------------------------------------------------------------------------------------------


@TASKS.register("multiple_choice")
class MultipleChoice(Task):
    """Which choice is the likeliest after the question: acc by its log-likelihood, acc_norm by that divided by the choice's
    characters, acc_bytes by its UTF-8 bytes."""

    needs = "query (text), choices (two texts or more) and gold (the number of the right one, from 0)"

    def question(self, fields) -> Choices:
        return Choices(fields["query"], list(fields["choices"]), int(fields["gold"]))

    def prepare(self, evaluator):
        self.items = [evaluator.encode_pair(q.context, " " + choice) for q in self.questions for choice in q.choices]

    def run(self, evaluator, params) -> dict:
        scores = evaluator.score(params, self.items)
        right, first = {"acc": [], "acc_norm": [], "acc_bytes": []}, 0
        for q in self.questions:
            likelihoods = np.array([score.log_likelihood for score in scores[first : first + len(q.choices)]])
            first += len(q.choices)
            for name, sizes in (("acc", 1), ("acc_norm", [len(c) for c in q.choices]),
                                ("acc_bytes", [len(c.encode()) for c in q.choices])):
                right[name].append(int(np.argmax(likelihoods / sizes)) == q.gold)
        estimates = [estimate(name, values) for name, values in right.items()]
        return {"n": len(self.questions), **{k: v for e in estimates for k, v in e.items()}, "cut": count_cut(scores)}


def count_cut(scores) -> int:
    return sum(score.cut for score in scores)


@TASKS.register("hellaswag")
class HellaSwag(MultipleChoice):
    """Zellers et al., arXiv:1905.07830. The published file, or one with the texts made ready."""

    needs = "activity_label, ctx_a, ctx_b, endings and label; or query, choices and gold"

    def question(self, fields):
        if "endings" not in fields:
            return super().question(fields)
        query = f"{fields['activity_label']}: {fields['ctx_a']} {fields['ctx_b'].capitalize()}"
        return Choices(self.clean(query), [self.clean(ending) for ending in fields["endings"]], int(fields["label"]))

    @staticmethod
    def clean(text: str) -> str:
        """Without what WikiHow's pages left in it."""
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


@TASKS.register("arc")
class Arc(MultipleChoice):
    """Clark et al., arXiv:1803.05457: easy and challenge alike."""

    needs = "question, choices (text and label) and answerKey; or query, choices and gold"

    def question(self, fields):
        if "answerKey" not in fields:
            q = super().question(fields)
            return q._replace(context=with_answer(q.context))
        choices = fields["choices"]
        return Choices(with_answer(f"Question: {fields['question']}"), list(choices["text"]),
                       list(choices["label"]).index(fields["answerKey"]))


@TASKS.register("piqa")
class Piqa(MultipleChoice):
    """Bisk et al., arXiv:1911.11641."""

    needs = "goal, sol1, sol2 and label; or query, choices and gold"

    def question(self, fields):
        if "goal" not in fields:
            q = super().question(fields)
            return q._replace(context=with_answer(q.context))
        return Choices(with_answer(f"Question: {fields['goal']}"), [fields["sol1"], fields["sol2"]], int(fields["label"]))


def with_answer(question: str) -> str:
    question = question.removesuffix("\n")
    return question if question.endswith("\nAnswer:") else question + "\nAnswer:"


# ---- Texts -------------------------------------------------------------------------------------------------------------------


@TASKS.register("lambada")
class Lambada(Task):
    """The last word of a passage (Paperno et al., arXiv:1606.06031), OpenAI's form: acc is the share of those that greedy
    decoding writes, perplexity that of a word."""

    needs = "text (two words or more)"

    def question(self, fields) -> Answer:
        context, blank, word = fields["text"].rpartition(" ")
        return Answer(context, blank + word)

    def prepare(self, evaluator):
        self.items = [evaluator.encode_pair(q.context, q.answer) for q in self.questions]

    def run(self, evaluator, params) -> dict:
        scores = evaluator.score(params, self.items)
        return {"n": len(scores), **estimate("acc", [score.greedy for score in scores]),
                **estimate("perplexity", [-score.log_likelihood for score in scores], scale=as_perplexity),
                "cut": count_cut(scores)}


@TASKS.register("text")
class Text:
    """Loss over the documents of any files that data.path could name: of a domain. Each is scored from its first token on, in
    windows of the model's context; the other measures count its words and its UTF-8 bytes."""

    def __init__(self, config, evaluator, path: str, limit: int = 0):
        self.skipped, self.items, self.words, self.bytes = [], [], [], []
        for record in read_records(config, find_files(config, path, "eval.tasks")):
            if not record.text:
                continue
            self.items.append(evaluator.encode_document(record.text))
            self.words.append(len(re.split(r"\s+", record.text)))
            self.bytes.append(len(record.text.encode()))
            if len(self.items) == limit:
                break
        if not any(len(item.ids) > item.first for item in self.items):
            raise UserError(f"eval.tasks: {path} has no text; give a file that has")

    def run(self, evaluator, params) -> dict:
        scores = evaluator.score(params, self.items)
        nll, tokens = [-score.log_likelihood for score in scores], [score.tokens for score in scores]
        return {"n": len(scores), "tokens": sum(tokens), **estimate("loss", nll, tokens),
                **estimate("perplexity", nll, tokens, as_perplexity),
                **estimate("word_perplexity", nll, self.words, as_perplexity),
                **estimate("bits_per_byte", nll, self.bytes, lambda ratio: ratio / math.log(2))}


# ---- Written answers ---------------------------------------------------------------------------------------------------------


@TASKS.register("gsm8k")
class Gsm8k(Task):
    """Sums in words (Cobbe et al., arXiv:2110.14168): exact_match, the number after "####" is the right one;
    exact_match_flexible, the last number is. The model writes at most 256 tokens, greedily."""

    needs = "question and answer (which ends in #### and a number)"
    tokens, until = 256, ("Question:", "</s>", "<|im_end|>")

    def question(self, fields) -> Answer:
        if "####" not in fields["answer"]:
            raise ValueError
        return Answer(f"Question: {fields['question']}\nAnswer:", " " + fields["answer"])

    def prepare(self, evaluator):
        self.contexts = [evaluator.encode(q.context) for q in self.questions]

    def run(self, evaluator, params) -> dict:
        written = evaluator.write(params, self.contexts, self.tokens, self.until)
        gold = [bare(q.answer) for q in self.questions]
        match = lambda find: [bare(find(text)) == right for text, right in zip(written, gold, strict=True)]
        cut = sum(len(ids) > evaluator.room(self.tokens) for ids in self.contexts)
        return {"n": len(written), **estimate("exact_match", match(strict_number)),
                **estimate("exact_match_flexible", match(last_number)), "cut": cut}


def strict_number(text: str) -> str:
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1] if found else "[invalid]"


def last_number(text: str) -> str:
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1] if found else "[invalid]"


def bare(answer: str) -> str:
    """The number alone, without what may stand round or in it."""
    answer = re.sub(r"(?s).*#### ", "", answer.replace(",", "").replace("$", ""))
    return answer.removesuffix(".").strip().lower()
