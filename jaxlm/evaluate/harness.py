"""lm-evaluation-harness in this process: a jaxlm model as one of its models, any of its tasks asked of it
(https://github.com/EleutherAI/lm-evaluation-harness). Importing this file needs lm-eval."""

import collections
import contextlib
import functools
import json
import logging
import os
import sys

from jaxlm.data.chat import open_chat_template
from jaxlm.errors import UserError
from jaxlm.evaluate.scoring import Item
from jaxlm.generate.sampling import Sampling
from jaxlm.registry import did_you_mean

os.environ.setdefault("TQDM_DISABLE", "1")  # its bars would run through ours
try:
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"eval.lm_eval needs lm-eval ({error}); pip install 'jaxlm[lm-eval]'") from error

TOKENS = 256  # written where a task does not say how many
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names of that, in its order
BOOTSTRAP = 1000  # resamples, for the standard error of what is no mean


class JaxLM(LM):
    """A model of jaxlm with its parameters. cut: for each task, how many texts were longer than the context.

    In a run of several processes each asks everything, and all answer together.
    """

    def __init__(self, evaluator, params):
        super().__init__()
        self.evaluator, self.params, self.cut = evaluator, params, collections.Counter()

    @functools.cached_property
    def template(self):
        return open_chat_template(self.evaluator.tokenizer, self.tokenizer_name)

    @property
    def tokenizer_name(self) -> str:
        return self.evaluator.config.data.tokenizer

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The text of a question: without add_generation_prompt it ends where the last message does, to be gone on with. A
        system message that the template refuses is left out. All as lm-eval's HFLM has it of transformers."""
        try:
            text = self.template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self.template.render(others, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        begin = text.rindex(last.strip())
        return text[: begin + len(last)] if text.startswith(last, begin) else text[: begin + len(last.rstrip())]

    def score(self, requests, items):
        scores = self.evaluator.score(self.params, items)
        self.cut.update(request.task_name for request, score in zip(requests, scores, strict=True) if score.cut)
        return scores

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        scores = self.score(requests, [self.evaluator.encode_pair(*request.args) for request in requests])
        return [(score.log_likelihood, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        # Unlike `encode_document`: what texts begin with is scored too, after itself, as lm-eval's own models do.
        items = [Item([*self.evaluator.prefix, *self.evaluator.encode(request.args[0])], 1) for request in requests]
        return [score.log_likelihood for score in self.evaluator.score(self.params, items)]  # windows: nothing is cut off

    def generate_until(self, requests, disable_tqdm: bool = False):
        answers, alike = [""] * len(requests), collections.defaultdict(list)
        for number, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(number)
        for options, numbers in alike.items():
            until, num_tokens, sampling = generation_options(json.loads(options))
            contexts = [self.evaluator.encode(requests[i].args[0]) or self.evaluator.prefix for i in numbers]
            room = self.evaluator.room(num_tokens)
            self.cut.update(requests[i].task_name for i, ids in zip(numbers, contexts, strict=True) if len(ids) > room)
            for i, text in zip(numbers, self.evaluator.write(self.params, contexts, num_tokens, until, sampling), strict=True):
                answers[i] = text
        return answers


def generation_options(options: dict) -> tuple[tuple[str, ...], int, Sampling]:
    """lm-eval's generation_kwargs -> (stop strings, tokens, sampling). Raises UserError: an option that jaxlm has not."""
    options = dict(options)
    until = options.pop("until", None) or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    lengths = [int(n) for name in LENGTHS if (n := options.pop(name, None)) is not None]
    temperature = float(options.pop("temperature", 0.0))
    if not options.pop("do_sample", temperature > 0):
        temperature = 0.0
    known = {name: options.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in options}
    if options:
        raise UserError(f"lm-eval: generation_kwargs {', '.join(sorted(options))}: jaxlm has no such option; remove it from the "
                        "task")
    return until, lengths[0] if lengths else TOKENS, Sampling(temperature=temperature, **known)


class Harness:
    """Tasks of lm-eval, loaded.

    Args:
        names: of tasks, groups or tags. path: a folder of task files of one's own, or "". limit: questions of each; 0: all.
        chat: ask through the tokenizer's chat template, solved questions as turns before.
    Raises UserError: a name that there is not, data that is out of reach.
    """

    def __init__(self, names, path: str, limit: int, chat: bool = False):
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        os.environ["DISABLE_MULTIPROC"] = "1"  # no forks of a process that runs JAX
        os.environ.pop("LOCAL_RANK", None)  # of a launcher: lm-eval would give results to one process of a machine alone
        self.limit, self.chat = limit or None, chat
        if path and not os.path.isdir(path):
            raise UserError(f"eval.lm_eval_path={path}: no such folder; give one with task files (.yaml)")
        manager = TaskManager(include_path=path, include_defaults=False) if path else None
        if manager is None or any(name not in manager.all_tasks for name in names):
            manager = TaskManager(include_path=path or None)
        if problems := [f"eval.lm_eval: {name!r} is no task of lm-eval; {did_you_mean(name, near(name, manager.all_tasks))}"
                        for name in names if name not in manager.all_tasks]:
            raise UserError(*problems)
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # whatever a task file or the download of its data may raise
            lines = str(error).splitlines() or [""]
            raise UserError(f"eval.lm_eval={','.join(names)}: lm-eval cannot load it ({type(error).__name__}: {lines[0][:300]}); "
                            "its data must be in reach: in the cache of Hugging Face, or a file that a task of "
                            "eval.lm_eval_path names") from error
        groups = [loaded["groups"][name] for name in names if name in loaded["groups"]]
        inside = {task.task_name for group in groups for task in group.get_all_tasks()}
        self.tasks = [*groups, *(task for name, task in loaded["tasks"].items() if name not in inside)]

    def run(self, evaluator, params) -> dict[str, dict]:
        """{task or group: {"n", measure, its standard error, ...}}, measures by their names in lm-eval, with the filter's name
        where there is one."""
        lm = JaxLM(evaluator, params)
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it resamples; our output may be JSON
            found = simple_evaluate(model=lm, tasks=self.tasks, limit=self.limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
                                    torch_random_seed=None, apply_chat_template=self.chat, fewshot_as_multiturn=self.chat)
        results = {}
        for name, values in found["results"].items():
            counts = found["n-samples"]
            results[name] = {"n": counts[name]["effective"]} if name in counts else {"n": 0}
            for key, value in values.items():
                if isinstance(value, (int, float)) and "," in key:
                    results[name][measure(key)] = float(value)
            results[name]["cut"] = lm.cut[name]
        return results


def measure(key: str) -> str:
    """lm-eval's "acc_stderr,none", "exact_match,strict-match" -> acc_stderr, exact_match_strict_match."""
    name, _, kind = key.partition(",")
    base, error = name.removesuffix("_stderr"), "_stderr" if name.endswith("_stderr") else ""
    return base + ("" if kind == "none" else "_" + kind.replace("-", "_")) + error


def near(name: str, names: list[str]) -> list[str]:
    """Of thousands of names, those that begin as this one does; or the first few."""
    return [n for n in names if n[:3] == name[:3]][:200] or names[:8]
