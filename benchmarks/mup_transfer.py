"""Where is the best learning rate, width for width? Tiny Shakespeare, standard parametrisation against mup, each width's runs as
one ensemble (`jaxlm/research/mup.py`); and the coordinate check of both. About five CPU-minutes.

    python benchmarks/mup_transfer.py [--workdir DIR]
"""

import argparse
import tempfile
import time

from record import save

from configs import default
from jaxlm.config import resolve
from jaxlm.validation import validate
from jaxlm.verbs.start import start_jax

WIDTHS, RATES = (32, 64, 128, 256), tuple(2.0**-n for n in (10, 9, 8, 7, 6, 5))


def config_of(parametrization: str):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 200, 8, 64
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 2, 32, 2
    c.model.parametrization, c.model.init_fan_in = parametrization, True
    if parametrization == "mup":
        c.model.base_embed_dim = 32
    c.eval.every_steps, c.eval.batches, c.eval.batch_size = 0, 20, 32
    c.checkpoint.every_steps = 0
    c.observe.progress, c.observe.report = "none", False
    resolve(c)
    validate(c)
    return c


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="keeps the runs, and goes on in them; empty: a temporary folder")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    start_jax()
    from jaxlm.research.mup import coordinate_check, transfer

    result, began = {}, time.process_time()
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("standard", "mup"):
            config = config_of(name)
            found = transfer(config, WIDTHS, RATES, f"{args.workdir or temporary}/{name}", args.seeds)
            print(f"{name}: {found['verdict']}", flush=True)
            result[name] = {**found, "coordinate_check": coordinate_check(config, (*WIDTHS, 512))}
            print(f"{name}: {result[name]['coordinate_check']['verdict']}", flush=True)
    save("mup_transfer", {"cpu_seconds": time.process_time() - began, "seeds": args.seeds, "results": result})


if __name__ == "__main__":
    main()
