"""The verbs of research: `jaxlm sweep`, `report`, `ensemble`, `mup`, `scale`, `replay`. Nothing heavy is imported before the
arguments and the config are right."""

import argparse
import itertools
import json
import os
import pathlib

from jaxlm.errors import UserError


def add_sweep(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file with a sweep(add) beside get_config")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="a folder for the sweep: a run directory an arm and seed")
    verb.add_argument("--mode", default="serial", metavar="NAME", help="print, serial, vmap, processes or slurm (%(default)s)")
    verb.add_argument("--workers", type=int, default=0, metavar="N", help="of processes; default: one a GPU, or a CPU core")
    verb.add_argument("--sbatch", default="", metavar="TEXT", help='of slurm: "--gpus-per-node=8 --time=2:00:00"')
    verb.add_argument("--seeds", type=int, default=0, metavar="N", help="only the first N seeds of each arm")
    verb.add_argument("--repeats", type=int, default=0, metavar="K", help="no arms: the config with K seeds, for its noise floor")
    verb.add_argument("--trials", type=int, default=0, metavar="N", help="a search by Optuna with the file's suggest(trial)")


def run_sweep(args):
    """Train every arm of a sweep with every seed; the same command again does what is left, then report.html compares them.

    A run that fails is recorded and the others go on. Any key can be set for all arms: --config.steps=500
    """
    for name in ("workers", "seeds", "repeats", "trials"):
        if (value := getattr(args, name)) < 0:
            raise UserError(f"--{name}={value}: must be at least 1, or left out")
    if args.repeats and args.trials:
        raise UserError("--repeats and --trials: give one of them")
    from jaxlm.research.sweep import plan

    sweep = None if args.trials else plan(args.config, args.overrides, args.workdir, args.seeds, args.repeats)
    from jaxlm.research.board import Board
    from jaxlm.research.modes import MODES, Options, failures

    mode, options = MODES[args.mode], Options(args.workers, args.sbatch)
    if args.trials:
        from jaxlm.research.searcher import search

        sweep = search(args.config, args.overrides, args.workdir, args.trials, args.seeds, args.mode, options)
        mode = serial_is_done
    if args.mode == "print":
        mode(sweep, None, options)
        return
    with Board(sweep) as board:
        mode(sweep, board, options)
    problems = failures(sweep, board)
    finish(sweep, bool(args.repeats))
    if problems:
        raise UserError(*problems, f"{len(problems)} of {len(sweep.runs)} runs failed; mend that, and the same command does them "
                        "again")


def serial_is_done(sweep, board, options) -> None:
    """Of a search: its trials have run."""


def finish(sweep, repeats: bool) -> None:
    """When nothing is left to do: the noise of each arm, and the report."""
    from jaxlm.research import noise, report
    from jaxlm.research.runs import arms_of, read_runs
    from jaxlm.research.sweep import status_of
    from jaxlm.verbs.start import cache_dir

    if not any(status_of(run) == "completed" for run in sweep.runs):
        return
    folder = str(sweep.workdir)
    arms = arms_of(read_runs([folder]), [arm.name for arm in sweep.arms])
    noise.store(arms, folder, cache_dir())
    if repeats:
        print(noise.sentence(arms[0]))
    found = report.write_report([folder], folder, cache_dir())
    print(f"{found['summary']}\n{folder}/report.html")


def add_report(verb):
    verb.add_argument("runs", nargs="*", metavar="RUN", help="run directories, or the folder of a sweep: one page compares them")
    verb.add_argument("--workdir", default="", metavar="DIR", help="one run, whose report.html is written again")
    verb.add_argument("--out", default="", metavar="DIR", help="where the files go; default: the folder of the sweep")
    verb.add_argument("--baseline", default="", metavar="ARM", help="what others are compared with; default: the first arm")
    verb.add_argument("--metric", default="", metavar="NAME", help="of metrics.jsonl: loss, bits_per_byte, valid/web:loss")
    verb.add_argument("--test", default="auto", metavar="NAME", help="auto (pairs where seed and data agree), paired, welch")
    verb.add_argument("--level", type=float, default=0.95, metavar="P", help="of the intervals (default %(default)s)")
    verb.add_argument("--correction", default="holm", metavar="NAME", help="for many arms: holm, benjamini-hochberg, none")
    verb.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two runs side by side, on the terminal")
    verb.add_argument("--assert-equal", action="store_true", help="with --compare: exit code 2 unless all metrics are equal bits")


def run_report(args):
    """Compare runs, or arms of a sweep: one page with intervals, p-values, curves and cost; tables for a paper.

    With --workdir, the page of one run is written again from its metrics.
    """
    if sum(map(bool, (args.runs, args.workdir, args.compare))) != 1:
        raise UserError("report: give run directories or a sweep's folder, or --workdir=DIR, or --compare A B")
    if args.assert_equal and not args.compare:
        raise UserError("--assert-equal: is of --compare A B")
    if args.compare:
        return compare_two(args)
    if args.workdir or len(args.runs) == 1 and os.path.isfile(os.path.join(args.runs[0], "config.json")):
        return rewrite(args)
    from jaxlm.registry import did_you_mean
    from jaxlm.research.report import TESTS, write_report
    from jaxlm.research.statistics import CORRECTIONS
    from jaxlm.verbs.start import cache_dir

    problems = [f"--{name}={getattr(args, name)}: {did_you_mean(getattr(args, name), valid)}"
                for name, valid in (("test", TESTS), ("correction", CORRECTIONS)) if getattr(args, name) not in valid]
    if not 0 < args.level < 1:
        problems.append(f"--level={args.level}: give a share between 0 and 1, such as 0.95")
    if len(args.runs) > 1 and not args.out:
        problems.append("--out: of several folders, say where the report goes: --out=DIR")
    if problems:
        raise UserError(*problems)
    out = args.out or args.runs[0]
    found = write_report(args.runs, out, cache_dir(), baseline=args.baseline, metric=args.metric, test=args.test,
                         level=args.level, correction=args.correction)
    print("\n".join([found["summary"], *found["notes"], f"{out}/report.html, report.json, table.md, table.tex"]))


def rewrite(args):
    from jaxlm.observe.report import write_report

    workdir = args.workdir or args.runs[0]
    if not os.path.isfile(os.path.join(workdir, "config.json")):
        raise UserError(f"--workdir={workdir}: no config.json there; give the directory of a training run")
    print(write_report(workdir))


def compare_two(args):
    from jaxlm.research.compare import assert_equal, compare
    from jaxlm.research.runs import Run
    from jaxlm.verbs.start import cache_dir

    a, b = (Run(pathlib.Path(path)) for path in args.compare)
    print("\n".join(compare(a, b, cache_dir())))
    if args.assert_equal:
        assert_equal(a, b)


def add_ensemble(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file, such as configs/shakespeare.py")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="a run directory for each member comes in here")
    verb.add_argument("--seeds", type=int, default=1, metavar="N", help="config.seed and those after it")
    verb.add_argument("--vary", action="append", default=[], metavar="KEY=A,B,..", help="a number; given again, each with each")
    verb.add_argument("--halve", type=halvings, default=(), metavar="STEP:LEFT,..", help="drop all but the best, by validation")
    verb.add_argument("--execution", default="auto", choices=("auto", "together", "in_turn"),
                      help="auto: together where there is an accelerator, in_turn on a CPU")


def halvings(text: str):
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 or not all(number.isdigit() for number in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r}: give STEP:LEFT, such as 100:4,200:2")
    return tuple((int(step), int(left)) for step, left in pairs)


def members_of(args) -> tuple[list, list[str]]:
    """-> (a config for each member, its name)."""
    from jaxlm.config import apply_overrides, load, resolve
    from jaxlm.validation import validate

    if args.seeds < 1:
        raise UserError(f"--seeds={args.seeds}: must be at least 1")
    if wrong := [part for part in args.vary if not all(part.partition("="))]:
        raise UserError(*(f"--vary={part}: give KEY=A,B, such as optimizer.learning_rate=1e-3,3e-3" for part in wrong))
    keys = [part.partition("=")[0] for part in args.vary]
    configs, names = [], []
    for values in itertools.product(*(part.partition("=")[2].split(",") for part in args.vary)):
        for number in range(args.seeds):
            config = load(args.config, args.overrides)
            apply_overrides(config, [f"--config.{key}={value}" for key, value in zip(keys, values, strict=True)])
            config.seed += number
            resolve(config)
            validate(config)
            configs.append(config)
            parts = [f"{key.rpartition('.')[2]}={value}" for key, value in zip(keys, values, strict=True)]
            names.append("-".join([*parts, *([f"seed={config.seed}"] if args.seeds > 1 or not parts else [])]))
    return configs, names


def run_ensemble(args):
    """Train runs that differ in numbers as one program: seeds, learning rates, betas, dropout, ... (docs/ensembles.md).

    Each member has a run directory of its own; the same command again goes on where it stopped.
    --seeds=4 --vary=optimizer.learning_rate=1e-3,3e-3 makes eight.
    """
    configs, names = members_of(args)
    from jaxlm.verbs.start import start_jax

    start_jax(configs[0])
    from jaxlm.observe.watchdog import Watchdog
    from jaxlm.parallel import distributed
    from jaxlm.research.ensemble import train_ensemble

    with Watchdog(configs[0].observe.hang_seconds, on_hang=lambda message: distributed.leave(1, [message])) as watchdog:
        summaries = train_ensemble(configs, [os.path.join(args.workdir, name) for name in names], halve=args.halve,
                                   overrides=args.overrides, execution=args.execution, alive=watchdog.beat)
    for name, summary in zip(names, summaries, strict=True):
        loss = "" if summary["valid_loss"] is None else f", validation loss {summary['valid_loss']:.4f}"
        print(f"{name}: {summary['status']} at step {summary['steps']}{loss}")


def add_mup(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file; its width is where the widths start")
    verb.add_argument("--widths", type=numbers(int), default=(), metavar="N,N,...", help="default: 1, 2, 4 times model.embed_dim")
    verb.add_argument("--steps", type=int, default=4, help="of the coordinate check (default %(default)s)")
    verb.add_argument("--seeds", type=int, default=4, help="models of each width, or of each learning rate (default %(default)s)")
    verb.add_argument("--learning_rates", type=numbers(float), default=(), metavar="X,X,...",
                      help="train each at each width to the end instead: where is the best one?")
    verb.add_argument("--workdir", default="", metavar="DIR", help="with --learning_rates, for the runs")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def numbers(kind):
    def parse(text):
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def run_mup(args):
    """Do learning rates carry over to other widths? The coordinate check, or with --learning_rates the experiment.

    model.parametrization=mup, with model.base_embed_dim, makes them. A check that fails exits with 2.
    """
    from jaxlm.config import load
    from jaxlm.verbs.start import start_alone

    config = load(args.config, args.overrides)
    if args.learning_rates and not args.workdir:
        raise UserError("--learning_rates: needs --workdir=DIR for the runs")
    start_alone("mup")
    from jaxlm.research.mup import coordinate_check, table, transfer

    widths = args.widths or tuple(config.model.embed_dim * n for n in (1, 2, 4))
    if args.learning_rates:
        result = transfer(config, widths, args.learning_rates, args.workdir, args.seeds, args.overrides)
        print(json.dumps(result) if args.json else result["verdict"])
        return
    result = coordinate_check(config, widths, args.steps, args.seeds, args.overrides)
    print(json.dumps(result) if args.json else f"{table(result)}\n")
    if not result["passes"]:
        raise UserError(result["verdict"])
    if not args.json:
        print(result["verdict"])


def add_scale(verb):
    verb.add_argument("--fit", nargs="+", default=[], metavar="RUN", help="run directories, or the folder of a sweep")
    verb.add_argument("--out", default="", metavar="DIR", help="where the law goes, the prediction, and the page")
    verb.add_argument("--predict", action="store_true", help="with --fit: foretell the run of --config in --workdir")
    verb.add_argument("--config", default="", metavar="FILE[:ARG]", help="with --predict: the larger run; its keys can be set")
    verb.add_argument("--score", default="", metavar="DIR", help="a prediction, by the run in --workdir, which has ended")
    verb.add_argument("--workdir", default="", metavar="RUN", help="the larger run: where it will be, or is")
    verb.add_argument("--level", type=float, default=0.95, metavar="P", help="of the intervals (default %(default)s)")


def run_scale(args):
    """Fit a scaling law to runs, predict a larger one before it exists, and score the prediction when it has ended.

    --fit RUN... --out=DIR, with --predict --config=FILE --workdir=RUN a prediction too; when RUN has ended,
    --score DIR --workdir=RUN
    """
    problems = []
    if bool(args.fit) == bool(args.score):
        problems.append("scale: give --fit RUN... --out=DIR, or --score DIR --workdir=RUN")
    wanted = {"--fit": ("out",), "--predict": ("config", "workdir"), "--score": ("workdir",)}
    for option, names in wanted.items():
        if getattr(args, option[2:]):
            problems += [f"{option}: needs --{name}" for name in names if not getattr(args, name)]
    if args.predict and not args.fit:
        problems.append("--predict: needs --fit RUN..., the runs that it is made from")
    if (args.config or args.overrides) and not args.predict:
        problems.append("--config: is of --predict, the run that is foretold")
    if not 0 < args.level < 1:
        problems.append(f"--level={args.level}: give a share between 0 and 1, such as 0.95")
    if problems:
        raise UserError(*problems)
    from jaxlm.config import load
    from jaxlm.research import prediction

    if args.score:
        print(f"{prediction.score(args.score, args.workdir)['verdict']}\n{args.score}/scaling.html")
        return
    if args.predict:
        config = load(args.config, args.overrides)
        prediction.require_not_begun(args.workdir)
    fitted = prediction.fit_runs(args.fit, args.out, args.level)
    print(prediction.summary(fitted))
    if args.predict:
        print(prediction.words_of(prediction.predict(fitted, config, args.workdir, args.out)))
    print(f"{args.out}/scaling.html")


def add_replay(verb):
    verb.add_argument("--workdir", required=True, metavar="DIR", help="the run directory")
    verb.add_argument("--step", type=int, required=True, metavar="N", help="the one that took the run to N completed steps")
    verb.add_argument("--from_start", action="store_true", help="where no checkpoint is before N: from the run's beginning")
    verb.add_argument("--rows", type=int, default=32, metavar="K", help="on the page, those with the highest loss (%(default)s)")


def run_replay(args):
    """What happened at a step: runs it again, bit for bit, from the newest checkpoint before it, and shows its batch, the loss of
    each token and the norms of each layer: replay-<N>.html and .json in the run directory.

    It exits with 2 where loss or grad_norm on the way are not those of metrics.jsonl.
    """
    problems = [f"--{name}={getattr(args, name)}: must be at least 1" for name in ("step", "rows") if getattr(args, name) < 1]
    if problems:
        raise UserError(*problems)
    from jaxlm.train.restore import config_of_run
    from jaxlm.verbs.start import start_alone

    start_alone("replay", config_of_run(args.workdir, args.overrides))
    from jaxlm.research.replay import replay
    from jaxlm.research.replay_page import write

    found = replay(args.workdir, args.step, args.overrides, args.from_start)
    print(f"{found['verdict']}\n{write(found, args.workdir, args.rows)}")
    if found["difference"]:
        raise UserError(found["difference"])
