"""`jaxlm data prepare`, `build`, `inspect`."""

import argparse
import json
import sys

from jaxlm.errors import UserError
from jaxlm.verbs.arguments import add_config


def add_data(verb):
    kinds = verb.add_subparsers(dest="kind", required=True, metavar="WHAT")
    for name, (run, add_arguments) in DATA.items():
        kind = kinds.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        add_arguments(kind)


def run_data(args):
    """Clean text, make a token store, or look at what a run saw: jaxlm data prepare, build, inspect."""
    DATA[args.kind][0](args)


def add_data_prepare(verb):
    add_config(verb)
    verb.add_argument("--out", required=True, metavar="DIR", help="the folder to make: then data.path=DIR/*.jsonl.zst")
    verb.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: one a CPU. Same bytes with any")
    verb.add_argument("--runner", default="local", metavar="NAME", help="local, or beam: Apache Beam, for a cluster")
    verb.add_argument("--runner_options", default="", metavar="TEXT", help='of Beam: "--runner=FlinkRunner ..."')


def run_data_prepare(args):
    """Clean documents: the steps of config.prepare, with a data card of what each did.

    The same command again goes on where it stopped. Any key can be set: --config.prepare.length.min_words=20
    """
    from jaxlm.config import load
    from jaxlm.data.cleaning.pipeline import prepare
    from jaxlm.data.cleaning.runners import RUNNERS

    config = load(args.config, args.overrides)
    runner = RUNNERS[args.runner](args.workers, args.runner_options)
    card = prepare(config, args.out, runner, args.overrides)
    start, end = card["input"], card["output"]
    if skipped := start["skipped"]["count"]:
        print(f"{skipped:,} records could not be read and were left out (data.on_error=skip); the first: "
              f"{start['skipped']['first'][0]}", file=sys.stderr)
    print(f"{start['documents']:,} documents, {start['characters']:,} characters -> {end['documents']:,} documents, "
          f"{end['characters']:,} characters; {args.out}/card.html")


def run_data_build(args):
    """Make the token store of a config, as its first run would; the same command again goes on where it stopped.

    Any config key can be set: --config.data.workers=8
    """
    from jaxlm.config import load
    from jaxlm.data.inspect import about_store

    print(about_store(load(args.config, args.overrides)))


def add_data_inspect(verb):
    verb.add_argument("--workdir", default="", metavar="DIR", help="a run directory, or")
    verb.add_argument("--config", default="", metavar="FILE[:ARG]", help="a config file")
    verb.add_argument("--step", type=int, required=True, metavar="N", help="from 1: the step whose loss metrics.jsonl has as N")
    verb.add_argument("--rows", type=int, default=4, metavar="K", help="rows of the batch shown (default %(default)s); 0: all")
    verb.add_argument("--json", action="store_true", help="print one JSON object, with the ids")


def run_data_inspect(args):
    """What a run saw at a step: the rows of its batch, decoded.

    [[...]] is no target of the loss, a line of dashes stands between documents that do not see each other, ____ is padding.
    """
    if bool(args.workdir) == bool(args.config):
        raise UserError("data inspect: give one of --workdir=DIR and --config=FILE")
    if args.step < 1 or args.rows < 0:
        raise UserError("--step must be at least 1 and --rows at least 0")
    from jaxlm.data.inspect import as_text, inspect

    seen = inspect(args.workdir, args.config, args.step, args.rows, args.overrides)
    print(json.dumps(seen) if args.json else as_text(seen))


DATA = {
    "prepare": (run_data_prepare, add_data_prepare),
    "build": (run_data_build, add_config),
    "inspect": (run_data_inspect, add_data_inspect),
}
