"""`jaxlm plan`."""

import functools
import json
import os
import sys

from jaxlm.errors import UserError
from jaxlm.verbs.start import cache_dir, start_jax


def add_plan(verb):
    verb.add_argument("--config", default="", metavar="FILE[:ARG]", help="a config file; without it give "
                      "--config.model.from_pretrained=DIR, a run made of Hugging Face weights, or these")
    verb.add_argument("--topology", default="", metavar="NAME", help="v5p:4x4x4, v5e-16, h200x8, ...; default: this machine")
    verb.add_argument("--slices", type=int, default=1, metavar="N", help="so many of them, joined by the slow network")
    verb.add_argument("--devices", type=int, default=0, metavar="N", help="plan for N (fake) CPU devices instead")
    verb.add_argument("--search", action="store_true", help="find the best mesh, remat and micro-batch")
    verb.add_argument("--estimate", action="store_true", help="compile nothing: an answer in seconds")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb.add_argument("--html", default="", metavar="FILE", help="write a page with pictures, such as plan.html")
    verb.add_argument("--save", default="", metavar="FILE", help="keep the executable, for jaxlm train --executable=FILE")
    verb.add_argument("--table", action="store_true", help="also each parameter: shape, mesh axes, bytes on one device")


def run_plan(args):
    """Will it fit, how fast, and what limits it: before anything is launched.

    The step is compiled by the compiler of the hardware, which need not be there: TPU with libtpu, CPU always.
    """
    from configs import default
    from jaxlm.config import load

    if problems := [f"--{name}={value}: must be at least {least}" for name, value, least in (
            ("slices", args.slices, 1), ("devices", args.devices, 0)) if value < least]:
        raise UserError(*problems)
    if args.topology and args.devices:
        raise UserError("--topology and --devices: give one of them")
    if args.save and (args.search or args.estimate):
        raise UserError("--save: needs the one layout of the config, compiled; leave --search and --estimate out")
    if not args.config:
        if not any(o.startswith("--config.model.from_pretrained=") for o in args.overrides):
            raise UserError("plan: give --config=FILE, or --config.model.from_pretrained=DIR")
        args.config = default.__file__
    config = load(args.config, args.overrides)
    if args.devices:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={args.devices}"
    if args.topology or args.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"  # leave this machine's accelerators alone
    start_jax()
    from jaxlm.data.loader import build_data
    from jaxlm.plan import executable, report
    from jaxlm.plan.devices import find
    from jaxlm.plan.estimate import sizes_of
    from jaxlm.plan.plan import as_json, plan, what_would_fit
    from jaxlm.plan.search import best_mesh, search

    target = find(args.topology, args.slices, args.devices)
    if args.estimate:
        target = target._replace(devices=None, missing="")
    sizes = sizes_of(config, config.model.vocab_size or build_data(config).vocab_size)
    cache = os.path.join(cache_dir(), "plans")
    say = (lambda line: None) if args.json else functools.partial(print, file=sys.stderr, flush=True)
    if args.search:
        plans = search(config, target, sizes, cache, say)
        if not plans:
            raise UserError(f"{args.config} on {target.name}: no mesh, rematerialisation and accumulation fits; "
                            + what_would_fit(config, target, sizes))
    else:
        if config.mesh.auto:
            layout, why = best_mesh(config, target, sizes)
            say(f"mesh=auto: {why}")
            config = layout.config(config)
        plans = [plan(config, target, sizes, cache=cache, keep=bool(args.save))]
    best = plans[0]
    advice = what_would_fit(config, target, sizes) if best.fits is False else ""
    if args.json:
        shown = [as_json(p, args.config, args.overrides) for p in plans]
        print(json.dumps({**shown[0], "ranked": shown} if args.search else shown[0]))
    else:
        if args.search:
            print("\n".join([*report.ranking(plans), ""]))
        print("\n".join(report.lines(best, args.config, args.overrides, advice)))
    if args.table:
        print("\n".join(report.parameters(best, sizes)))
    if args.html:
        report.write_page(args.html, plans, args.config, args.overrides, advice)
    if args.save:
        if not best.compiled:
            raise UserError(f"--save={args.save}: nothing was compiled; {advice or target.missing}")
        executable.save(args.save, best.compiled.program, best.compiled.executable)
