"""`jaxlm VERB`: the verbs are in `jaxlm.verbs`. Nothing heavy is imported before the arguments and the config are right."""

import argparse
import os
import sys
import time
import traceback

# NumPy's and SciPy's products are tiny here (the fits of `jaxlm scale`): threads for them only wait, and take cores from others.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from jaxlm.errors import Diverged, PeerLost, Preempted, UserError
from jaxlm.observe import process_log
from jaxlm.parallel import distributed
from jaxlm.verbs import bench, convert, data, evaluate, generate, plan, research, train


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 bad config or input, 3 diverged, 75 preempted after saving, 1 anything else.

    Of several processes, all end with the same code: by themselves where all came to the same end, else because one tells.
    """
    began = interpreter_start()
    parser = argparse.ArgumentParser(prog="jaxlm", description="Train Transformer language models in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, (run, add_arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        add_arguments(verb)
    args, rest = parser.parse_known_args(argv)
    args.began = began
    args.overrides = [a for a in rest if a.startswith("--config.")]
    try:
        if unknown := [a for a in rest if not a.startswith("--config.")]:
            raise UserError(*(f"{a}: unknown argument; see jaxlm {args.verb} --help" for a in unknown))
        VERBS[args.verb][0](args)
        return end(0)
    except UserError as error:
        if distributed.num_processes() > 1:
            distributed.leave(2, list(error.problems))
        return end(2, *error.problems)
    except PeerLost as error:
        return end(1, str(error))
    except Diverged as error:
        return end(3, f"diverged: {error}")
    except Preempted as error:
        return end(75, f"preempted: {error}")
    except Exception as error:
        if distributed.num_processes() == 1:
            raise
        process_log.write(traceback.format_exc())
        traceback.print_exc()
        time.sleep(1)  # a lost peer shows as an odd error here, and a moment later on the line, by its name
        distributed.leave(1, [f"process {distributed.process_id()} failed: {type(error).__name__}: {error}"[:500]])


def end(code: int, *lines: str) -> int:
    for line in lines:
        process_log.write(f"jaxlm: {line}")
        if distributed.is_main():
            print(f"jaxlm: {line}", file=sys.stderr)
    distributed.finish()
    return code


def interpreter_start() -> float:
    """Unix time at which Python began, so that "seconds to first step" counts imports too. Until here it has only
    computed; the start of the process itself may lie minutes back, in a launcher that installed things and then exec'ed."""
    return time.time() - time.process_time()


VERBS = {
    "train": (train.run_train, train.add_train),
    "eval": (evaluate.run_eval, evaluate.add_eval),
    "generate": (generate.run_generate, generate.add_generate),
    "data": (data.run_data, data.add_data),
    "chat": (generate.run_chat, generate.add_chat),
    "serve": (generate.run_serve, generate.add_serve),
    "plan": (plan.run_plan, plan.add_plan),
    "bench": (bench.run_bench, bench.add_bench),
    "sweep": (research.run_sweep, research.add_sweep),
    "report": (research.run_report, research.add_report),
    "convert": (convert.run_convert, convert.add_convert),
    "ensemble": (research.run_ensemble, research.add_ensemble),
    "mup": (research.run_mup, research.add_mup),
    "scale": (research.run_scale, research.add_scale),
    "replay": (research.run_replay, research.add_replay),
    "average": (train.run_average, train.add_average),
    "doctor": (bench.run_doctor, lambda verb: None),
}

if __name__ == "__main__":
    sys.exit(main())
