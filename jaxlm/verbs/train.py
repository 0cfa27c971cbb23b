"""`jaxlm train`, `jaxlm average`."""

from jaxlm.errors import UserError
from jaxlm.parallel import distributed
from jaxlm.verbs.arguments import add_config, add_workdir
from jaxlm.verbs.start import start_jax


def add_train(verb):
    add_config(verb)
    add_workdir(verb)
    verb.add_argument("--allow_config_change", action="store_true", help="go on in a work directory of another config")
    verb.add_argument("--executable", default="", metavar="FILE", help="start from the step that jaxlm plan --save compiled")


def run_train(args):
    """Train a model; the same command again goes on where it stopped.

    Any config key can be set: --config.optimizer.learning_rate=3e-4
    """
    from jaxlm.config import load

    config = load(args.config, args.overrides)
    start_jax(config)
    from jaxlm.observe.fitting import judge_run
    from jaxlm.observe.watchdog import Watchdog
    from jaxlm.train.loop import train

    with Watchdog(config.observe.hang_seconds, on_hang=lambda message: distributed.leave(1, [message])) as watchdog:
        summary = train(config, args.workdir, args.allow_config_change, args.began, args.overrides, watchdog.beat,
                        args.executable)
    if not distributed.is_main():
        return
    valid = "" if summary["valid_loss"] is None else f", validation loss {summary['valid_loss']:.4f}"
    report = f"; {args.workdir}/report.html" if config.observe.report else ""
    print(f"{summary['status']}: step {summary['steps']}{valid} in {summary['elapsed_seconds']:.0f} s{report}")
    print(judge_run(args.workdir).text)


def add_average(verb):
    add_workdir(verb)
    verb.add_argument("--to", required=True, metavar="DIR", help="the run directory to make")
    verb.add_argument("--last", type=int, default=5, metavar="K", help="so many checkpoints, the newest (default %(default)s)")


def run_average(args):
    """Average the parameters of a run's last checkpoints into a run of its own, which eval and generate take."""
    if args.last < 1:
        raise UserError(f"--last={args.last}: must be at least 1")
    start_jax()
    from jaxlm.train.average import average

    average(args.workdir, args.to, args.last, args.overrides)
