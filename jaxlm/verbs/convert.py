"""`jaxlm convert`."""

import gc

from jaxlm.errors import UserError
from jaxlm.verbs.arguments import add_workdir
from jaxlm.verbs.start import start_jax


def add_convert(verb):
    add_workdir(verb)
    verb.add_argument("--from", dest="source", default="", metavar="DIR", help="Hugging Face weights to make the run of: "
                      "a folder, or org/name[@revision] of the Hub")
    verb.add_argument("--to", default="", metavar="DIR", help="the Hugging Face folder to make of the run")
    verb.add_argument("--adapter", action="store_true", help="with --to, the run's LoRA adapters alone, in PEFT's form")
    verb.add_argument("--family", default="", metavar="NAME", help="with --to, its model_type; default: where it came from, or "
                      "the first that has such a model")


def run_convert(args):
    """Hugging Face weights to a run directory (--from), or a run to a Hugging Face folder (--to).

    The run directory is what eval, generate and --config.model.from_pretrained take. Any key can be set, as for train:
    --config.mesh.fsdp=8, --config.model.param_dtype=float32, --config.seq_len=8192.
    """
    if bool(args.source) == bool(args.to):
        raise UserError("convert: give one of --from=DIR (Hugging Face to --workdir) and --to=DIR (--workdir to Hugging Face)")
    if args.family and not args.to:
        raise UserError(f"--family={args.family}: is of --to; config.json of --from tells it")
    if args.adapter and not args.to:
        raise UserError("--adapter: is of --to; adapters that a run starts with are --config.model.adapter=DIR")
    gc.disable()  # looking through the modules again and again takes a fifth of their import, and more later
    start_jax(keep_memory=False)  # freed buffers of a tensor are not kept for the next
    from jaxlm.huggingface.convert import export_run, import_run

    gc.freeze()
    gc.enable()
    if args.source:
        import_run(args.source, args.workdir, args.overrides)
    else:
        export_run(args.workdir, args.to, args.overrides, args.family, args.adapter)
