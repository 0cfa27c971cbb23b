"""What `config.eval` asks of a model beside its validation split: tasks from files, tasks of lm-eval; run inside training and by
`jaxlm eval`."""

from collections.abc import Iterator

from jaxlm.errors import UserError
from jaxlm.evaluate.scoring import Evaluator
from jaxlm.evaluate.tasks import TASKS, split_entry


class Suite:
    """about: lines for the log."""

    def __init__(self, evaluator, tasks: dict, harness, about: tuple[str, ...] = ()):
        self.evaluator, self.tasks, self.harness, self.about = evaluator, tasks, harness, about

    def run(self, params) -> Iterator[tuple[str, dict]]:
        """(name, {"n": questions asked, "acc": ..., "acc_stderr": ...}) of each task; what is measured depends on it."""
        for name, task in self.tasks.items():
            yield name, task.run(self.evaluator, params)
        if self.harness:
            yield from self.harness.run(self.evaluator, params).items()

    def lines(self, params, step: int) -> Iterator[dict]:
        """For metrics.jsonl."""
        for name, result in self.run(params):
            yield {"split": f"task/{name}", "step": step, **result}


def build_suite(config, model, tokenizer, mesh) -> Suite:
    """Reads all questions. Raises UserError: all that is wrong with the tasks, or a model that they cannot be asked of."""
    asked, names, path = config.eval.tasks, config.eval.lm_eval, config.eval.lm_eval_path
    limit, chat = config.eval.task_limit, config.eval.lm_eval_chat
    if not asked and not names:
        return Suite(None, {}, None)
    problems, tasks = [], {}
    evaluator = Evaluator(config, model, tokenizer, mesh)
    for entry in asked:
        try:
            kind, file, options = split_entry(entry)
            name = options.pop("name", kind)
            if name in tasks:
                raise UserError(f"eval.tasks: two are called {name!r}; give one a name: {(kind, file, {'name': name + '_2'})}")
            tasks[name] = TASKS[kind](config, evaluator, file, limit, **options)
        except UserError as error:
            problems += error.problems
    harness = None
    if names:
        from jaxlm.evaluate.harness import Harness

        try:
            harness = Harness(names, path, limit, chat)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    about = tuple(f"task {name}: {len(task.skipped)} records could not be read and are left out (data.on_error=skip); the first: "
                  f"{task.skipped[0]}" for name, task in tasks.items() if task.skipped)
    return Suite(evaluator, tasks, harness, about)


def table(results: dict) -> str:
    """For people: task, measure, value, standard error, questions."""
    rows = [("task", "measure", "value", "+-", "n")]
    for name, result in results.items():
        for key, value in result.items():
            if key in ("n", "cut", "tokens") or key.endswith("_stderr"):
                continue
            error = result[f"{key}_stderr"] if f"{key}_stderr" in result else None
            rows.append((name, key, f"{value:.4f}", "" if error is None else f"{error:.4f}", f"{result['n']:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ["  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(
        text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True))]).rstrip() for row in rows]
    lines += [f"{name}: {result['cut']:,} texts were longer than the model's context and lost their beginning"
              for name, result in results.items() if "cut" in result and result["cut"]]
    return "\n".join(lines)
