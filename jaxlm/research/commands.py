"""The verbs of research: `jaxlm sweep`, and `jaxlm report` of several runs."""

import os
import pathlib

from jaxlm.errors import UserError


def add_sweep(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file with a sweep(add) beside get_config")
    verb.add_argument("--workdir", required=True, metavar="DIR", help="a folder for the sweep: a run directory an arm and seed")
    verb.add_argument("--mode", default="serial", metavar="NAME", help="print, serial, processes, slurm (default %(default)s)")
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
    from jaxlm.cli import cache_dir
    from jaxlm.research import noise, report
    from jaxlm.research.runs import arms_of, read_runs
    from jaxlm.research.sweep import status_of

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
    from jaxlm.cli import cache_dir
    from jaxlm.registry import did_you_mean
    from jaxlm.research.report import TESTS, write_report
    from jaxlm.research.statistics import CORRECTIONS

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
    from jaxlm.cli import cache_dir
    from jaxlm.research.compare import assert_equal, compare
    from jaxlm.research.runs import Run

    a, b = (Run(pathlib.Path(path)) for path in args.compare)
    print("\n".join(compare(a, b, cache_dir())))
    if args.assert_equal:
        assert_equal(a, b)
