"""`jaxlm eval`."""

import json
import sys

from jaxlm.errors import UserError
from jaxlm.parallel import distributed
from jaxlm.verbs.arguments import add_checkpoint, add_model
from jaxlm.verbs.start import start_alone, start_jax


def add_eval(verb):
    add_model(verb)
    add_checkpoint(verb)
    verb.add_argument("--config", default="", metavar="FILE[:ARG]", help="with --crossval: what to train")
    verb.add_argument("--crossval", type=int, default=0, metavar="K", help="train K runs in --workdir, each with another part "
                      "of the training split held out, and evaluate each on its part")
    verb.add_argument("--ensemble", default="", metavar="RUN,...", help="run directories, or a folder of them: score the mean of "
                      "their probabilities; a classifier's page goes into --workdir, or that folder")
    verb.add_argument("--split", default="valid", choices=("valid", "test"), help="of the data (default %(default)s)")
    verb.add_argument("--tasks", default="", metavar="KIND:FILE,...", help="ask the questions of these files instead: hellaswag, "
                      "arc, piqa, multiple_choice, lambada, gsm8k, or text for a domain's loss; NAME=KIND:FILE gives it a name")
    verb.add_argument("--lm_eval", default="", metavar="TASK,...", help="ask tasks of lm-eval; needs the extra lm-eval")
    verb.add_argument("--lm_eval_path", default="", metavar="DIR", help="a folder of task files of one's own for it")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run_eval(args):
    """What a run's newest checkpoint, or Hugging Face weights, make of the validation split (loss, perplexity, bits per byte) and
    of the config's eval.tasks; or of --tasks and --lm_eval. With data.form=pair and eval.text_metrics it also answers each
    prompt, and scores that: DIR/predictions-<split>.jsonl. Of a classifier: accuracy, F1, AUC-ROC, calibration, confusion matrix,
    with a page of pictures beside the run. With --ensemble, of several runs together.

    Any config key can be set: --config.eval.task_limit=100, --config.seq_len=1024
    """
    if args.crossval or args.config:
        return run_crossval(args)
    from jaxlm.evaluate.tasks import parse_tasks

    asked, names = parse_tasks(args.tasks), tuple(filter(None, args.lm_eval.split(",")))
    if args.lm_eval_path and not names:
        raise UserError("--lm_eval_path: is for --lm_eval; name the tasks")
    only_tasks = bool(asked or names)
    if args.ensemble:
        if only_tasks:
            raise UserError("--ensemble: scores a split; leave --tasks and --lm_eval out, or ask each run alone")
        return run_ensemble_eval(args)
    if only_tasks:
        args.overrides += [f"--config.eval.tasks={asked!r}", f"--config.eval.lm_eval={names!r}",
                           f"--config.eval.lm_eval_path={args.lm_eval_path}"]
    start_jax()
    from jaxlm.evaluate.suite import build_suite, table
    from jaxlm.train.restore import open_run

    run = open_run(args.workdir, args.overrides, text=not only_tasks, checkpoint=args.checkpoint)
    if run.config.objective.name == "classification":
        from jaxlm.evaluate.classification import report_classes

        return report_classes(run, args.split, args.workdir, args.json)
    suite = build_suite(run.config, run.model, run.data.tokenizer, run.mesh)
    result = {"step": run.step}
    if not only_tasks:
        result |= of_split(args, run)
    results = dict(suite.run(run.params))
    if not distributed.is_main():
        return
    if args.json:
        print(json.dumps(result | {"tasks": results} if results else result))
        return
    for line in suite.about:
        print(line, file=sys.stderr)
    print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items()))
    if results:
        print(table(results))


def of_split(args, run) -> dict:
    from jaxlm.data.feed import Feed
    from jaxlm.evaluate.evaluation import evaluate_examples
    from jaxlm.evaluate.perplexity import evaluate_split
    from jaxlm.objectives.build import build_objective
    from jaxlm.parallel.compile import jit
    from jaxlm.parallel.rules import batch_sharding
    from jaxlm.train.frozen import frozen_of_run
    from jaxlm.train.step import build_eval_step

    split = run.data.valid if args.split == "valid" else run.data.test
    if split is None:
        raise UserError(f"{args.workdir or 'data'}: its data has no validation split (data.source=synthetic)"
                        if args.split == "valid" else "--split=test: there is none; set --config.data.test_path=FILE")
    objective = build_objective(run.config)
    frozen, own = frozen_of_run(run, objective)
    eval_step = jit(run.mesh, build_eval_step(run.model, objective, frozen))
    feed = Feed(batch_sharding(run.mesh), (split.batch_size, run.config.seq_len))
    lines = evaluate_split(lambda params, batch: eval_step(params, batch, *own), run.params, split, feed)
    sources = {name: line for name, line in lines.items() if name != "all"}
    return {**lines["all"], **({"sources": sources} if sources else {}), **evaluate_examples(run, args.split, args.workdir)}


def run_ensemble_eval(args):
    """`jaxlm eval --ensemble=RUN,...`."""
    from jaxlm.research.runs import read_runs

    paths = [path for path in args.ensemble.split(",") if path]
    runs = [run for run in read_runs(paths) if run.status not in ("dropped", "diverged")]
    if not runs:
        raise UserError(f"--ensemble={args.ensemble}: none of the runs there came to its end")
    workdir = args.workdir or (paths[0] if len(paths) == 1 else "")
    start_jax()
    from jaxlm.evaluate.ensemble import report_ensemble

    report_ensemble([str(run.folder) for run in runs], args.split, workdir, args.json, args.overrides, args.checkpoint)


def run_crossval(args):
    """`jaxlm eval --config=FILE --crossval=K --workdir=DIR`."""
    if not (args.config and args.crossval and args.workdir) or args.split != "valid":
        raise UserError("--crossval=K: give --config=FILE and --workdir=DIR with it, and no --split; without it eval takes no "
                        "--config")
    from jaxlm.config import load
    from jaxlm.evaluate.crossval import check_folds, cross_validate

    check_folds(load(args.config, args.overrides), args.crossval)
    folds = [f"--config.data.folds={args.crossval}", *(["--config.observe.progress=none"] if args.json else [])]
    configs = [load(args.config, [*args.overrides, *folds, f"--config.data.fold={i}"]) for i in range(args.crossval)]
    start_alone("eval --crossval", configs[0])
    from jaxlm.observe.watchdog import Watchdog
    from jaxlm.train.loop import train

    def train_fold(config, workdir):
        with Watchdog(config.observe.hang_seconds, on_hang=lambda message: distributed.leave(1, [message])) as watchdog:
            train(config, workdir, overrides=[*args.overrides, *folds], alive=watchdog.beat)

    cross_validate(configs, args.workdir, train_fold, args.checkpoint, args.json)
