"""The verbs `jaxlm ensemble` and `jaxlm mup`. Nothing heavy is imported before the arguments and the config are right."""

import argparse
import itertools
import json
import os

from jaxlm.errors import UserError


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
    from jaxlm.config import apply_overrides, load, resolve, validate

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
    from jaxlm.cli import start_jax

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
    from jaxlm.cli import start_alone
    from jaxlm.config import load

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
