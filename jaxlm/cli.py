"""`jaxlm VERB`: one thin entry per verb. Nothing heavy is imported before the arguments and the config are right."""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
import traceback

from jaxlm.errors import Diverged, PeerLost, Preempted, UserError
from jaxlm.observe import process_log
from jaxlm.parallel import distributed
from jaxlm.research import commands


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


def start_jax(config=None, keep_memory: bool = True) -> None:
    """Set JAX up for this process, and join the run's other processes; before anything touches a device."""
    from configs import default
    from jaxlm.train import heap

    config = config or default.get_config()
    compile_cache = config.observe.compile_cache
    if keep_memory:
        heap.keep_freed_memory()
    else:
        heap.one_heap()
    # With several CPU devices in one process, a collective holds a thread of each until all have come. XLA's default, one for
    # each core, can leave two collectives waiting for each other's threads for good. With more that is rare: XLA starts
    # collectives that do not depend on one another in any order, on each device its own.
    if "host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
        os.environ.setdefault("PJRT_NPROC", "256")
    import jax

    # On a CPU a step that is sent ahead of its predecessor's end only takes a second work space beside the first.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache_dir(), "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    command = hashlib.sha256(json.dumps([sys.argv[1:], config.to_json()]).encode()).hexdigest()[:12]
    distributed.start(config.observe.join_seconds, config.observe.peer_seconds, {"command and config": command})


def cache_dir() -> str:
    return os.environ.get("JAXLM_CACHE") or os.path.expanduser("~/.cache/jaxlm")


def add_config(verb):
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="a config file, such as configs/shakespeare.py")


def add_model(verb):
    verb.add_argument("--workdir", default="", metavar="DIR", help="the run directory; without it give "
                      "--config.model.from_pretrained=DIR, a run or Hugging Face weights (folder or org/name)")


def add_workdir(verb):
    verb.add_argument("--workdir", required=True, metavar="DIR", help="the run directory")


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


def add_checkpoint(verb):
    verb.add_argument("--checkpoint", default="", metavar="WHICH", help="of the run: best (by eval.metric), latest, or a step; "
                      "default: best where the run keeps it (checkpoint.keep_best, eval.patience), else latest")


def add_eval(verb):
    add_model(verb)
    add_checkpoint(verb)
    verb.add_argument("--config", default="", metavar="FILE[:ARG]", help="with --crossval: what to train")
    verb.add_argument("--crossval", type=int, default=0, metavar="K", help="train K runs in --workdir, each with another part "
                      "of the training split held out, and evaluate each on its part")
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
    with a page of pictures beside the run.

    Any config key can be set: --config.eval.task_limit=100, --config.seq_len=1024
    """
    if args.crossval or args.config:
        return run_crossval(args)
    from jaxlm.evaluate.tasks import parse_tasks

    asked, names = parse_tasks(args.tasks), tuple(filter(None, args.lm_eval.split(",")))
    if args.lm_eval_path and not names:
        raise UserError("--lm_eval_path: is for --lm_eval; name the tasks")
    only_tasks = bool(asked or names)
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


def add_sampling(verb):
    verb.add_argument("--tokens", type=int, default=500, help="tokens to write, at most (default %(default)s)")
    verb.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default %(default)s)")
    verb.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest; 0: all")
    verb.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest that sum to p")
    verb.add_argument("--min_p", type=float, default=0.0, help="sample among those with this share of the likeliest's")
    verb.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: holds back what the text has already")
    verb.add_argument("--seed", type=int, default=0)


def sampling_of(args, problems: list[str], least_one=("tokens",)):
    """Adds to `problems` what is wrong, and raises UserError where there are any."""
    from jaxlm.generate.sampling import Sampling

    problems += [f"--{name}={value}: must be at least 1" for name in least_one if (value := getattr(args, name)) < 1]
    options = Sampling(args.repetition_penalty, args.temperature, args.top_k, args.top_p, args.min_p)
    try:
        options.check()
    except UserError as error:
        problems += [f"--{problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return options


def add_generate(verb):
    add_model(verb)
    add_checkpoint(verb)
    verb.add_argument("--prompt", default="\n", help="text to go on from, or to answer: to translate, say (default: a new line)")
    verb.add_argument("--prompts", default="", metavar="FILE", help="a file with a prompt in each line, instead of --prompt")
    add_sampling(verb)
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again")
    verb.add_argument("--stop_token", action="append", default=[], metavar="NAME", help="end at this special token too")
    verb.add_argument("--beams", type=int, default=1, help="beam search of so many texts instead of sampling")
    verb.add_argument("--length_penalty", type=float, default=1.0, help="of beam search: above 0 prefers longer texts")
    verb.add_argument("--json", action="store_true", help="a JSON object for each prompt, with tokens and log-probability")


def run_generate(args):
    """Write text with a run, or with Hugging Face weights."""
    prompts, problems = [args.prompt], []
    if args.prompts:
        try:
            prompts = [line for line in pathlib.Path(args.prompts).read_text().splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"--prompts={args.prompts}: cannot be read ({error}); give a text file")
    if not all(prompts) or not prompts:
        problems.append("--prompt: is empty; give at least one character")
    options = sampling_of(args, problems, ("tokens", "beams"))
    start_jax()
    from jaxlm.generate.write import write
    from jaxlm.train.restore import open_run

    run = open_run(args.workdir, args.overrides, text=False, checkpoint=args.checkpoint)
    write(run, prompts, args.tokens, options, seed=args.seed, stop=tuple(args.stop), stop_tokens=tuple(args.stop_token),
          beams=args.beams, length_penalty=args.length_penalty, as_json=args.json)


def add_template_options(verb):
    verb.add_argument("--template_options", default="{}", metavar="JSON",
                      help="what the chat template knows, such as '{\"enable_thinking\": false}'")


def template_options_of(args) -> dict:
    try:
        options = json.loads(args.template_options)
    except ValueError as error:
        raise UserError(f"--template_options={args.template_options}: is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise UserError(f"--template_options={args.template_options}: must be a JSON object")
    return options


def start_alone(verb: str, config=None) -> None:
    start_jax(config)
    if distributed.num_processes() > 1:
        raise UserError(f"jaxlm {verb} runs in one process, on all devices that this one has; start it without a launcher")


def add_chat(verb):
    add_model(verb)
    verb.add_argument("--system", default="", metavar="TEXT", help="instructions before the conversation")
    add_sampling(verb)
    add_template_options(verb)


def run_chat(args):
    """Talk with a run's newest checkpoint; where the input is no terminal, each line of it is a message."""
    options, template_options = sampling_of(args, []), template_options_of(args)
    start_alone("chat")
    from jaxlm.generate.chat import chat
    from jaxlm.train.restore import open_run

    chat(open_run(args.workdir, args.overrides, text=False), args.tokens, options, seed=args.seed, system=args.system,
         template_options=template_options, history=os.path.join(cache_dir(), "chat_history"))


def add_serve(verb):
    add_model(verb)
    verb.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine only)")
    verb.add_argument("--port", type=int, default=8000, help="0: any that is free (default %(default)s)")
    verb.add_argument("--api_key", default="", help="what clients must send; better in $JAXLM_API_KEY, which others cannot see")
    verb.add_argument("--rows", type=int, default=8, help="answers written at a time (default %(default)s)")
    verb.add_argument("--queue", type=int, default=64, help="answers that may wait; above that: 429 (default %(default)s)")
    verb.add_argument("--max_tokens", type=int, default=0, help="of an answer; 0: what the context has room for")
    verb.add_argument("--max_request_bytes", type=int, default=2**20, help="above that: 413 (default %(default)s)")
    verb.add_argument("--timeout", type=float, default=600.0, help="seconds for an answer; above that: 504 (default %(default)s)")
    add_template_options(verb)


def run_serve(args):
    """An OpenAI-compatible HTTP server of a run's newest checkpoint: completions and chat, streamed or not.

    SIGTERM or Ctrl-C: answers that are being written are finished, then it ends with 0.
    """
    problems = [f"--{name}={value}: must be at least {least}" for name, least in (
        ("rows", 1), ("queue", 0), ("max_tokens", 0), ("max_request_bytes", 1)) if (value := getattr(args, name)) < least]
    problems += [f"--port={args.port}: must be 0 to 65535"] if not 0 <= args.port < 65536 else []
    problems += [f"--timeout={args.timeout}: must be above 0"] if not 0 < args.timeout < 1e7 else []
    if problems:
        raise UserError(*problems)
    template_options = template_options_of(args)
    try:
        from jaxlm.serve.server import Limits, serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve: {error.name} is not installed; pip install 'jaxlm[serve]'") from error
    start_alone("serve")
    from jaxlm.train.restore import open_run

    limits = Limits(args.rows, args.queue, args.max_tokens, args.max_request_bytes, args.timeout)
    serve(lambda: open_run(args.workdir, args.overrides, text=False), args.workdir, args.host, args.port, limits,
          args.api_key or os.environ.get("JAXLM_API_KEY", ""), template_options)


def add_bench(verb):
    verb.add_argument("--config", metavar="FILE[:ARG]", help="what to measure, such as configs/gpt2_124m.py")
    verb.add_argument("--warmup", type=int, default=0, metavar="N", help="steps before timing (15; on a CPU 3)")
    verb.add_argument("--blocks", type=int, default=0, metavar="N", help="blocks timed (7; on a CPU 5)")
    verb.add_argument("--block_steps", type=int, default=0, metavar="N", help="steps in a block (20; on a CPU 5)")
    verb.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    verb.add_argument("--profile", default="", metavar="DIR", help="after the timing, write an XProf trace of three steps there")
    verb.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two results of --json side by side; measures nothing")


def run_bench(args):
    """How fast a config trains here: tokens/s, MFU, matmul ceiling, memory, compile time.

    Feeds random tokens where the config sets model.vocab_size, else the run's own data. Any key can be set, as for train.
    """
    from jaxlm.observe import scores

    if args.compare:
        print(scores.comparison(*args.compare))
        return
    if not args.config:
        raise UserError("bench: nothing to do; give --config=FILE to measure, or --compare A.json B.json")
    if problems := [f"--{name}={value}: must be at least 1, or left out" for name in ("warmup", "blocks", "block_steps")
                    if (value := getattr(args, name)) < 0]:
        raise UserError(*problems)
    from jaxlm.config import load

    config = load(args.config, args.overrides)
    start_jax(config)
    from jaxlm.train.bench import bench

    result = bench(config, args.warmup, args.blocks, args.block_steps, args.overrides, args.profile)
    if not distributed.is_main():
        return
    if args.json:
        print(json.dumps({key: result[key] for key in scores.KEYS}))
        return
    print(scores.table(result))
    if args.profile:
        print(scores.operations(args.profile))


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
    start_jax(keep_memory=False)  # freed buffers of a tensor are not kept for the next
    from jaxlm.huggingface.convert import export_run, import_run

    if args.source:
        import_run(args.source, args.workdir, args.overrides)
    else:
        export_run(args.workdir, args.to, args.overrides, args.family, args.adapter)


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


def run_doctor(args):
    """Versions, devices, what each attention backend says of this machine, and a 10-second self-test."""
    import importlib.metadata

    from jaxlm.train.rundir import PACKAGES

    print("python", sys.version.split()[0], " ", "  ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES))
    start_jax()
    import jax
    import numpy as np

    from configs import default
    from jaxlm.kernels.attention import BACKENDS, attend, request_of

    print("devices", ", ".join(f"{d.device_kind} ({d.platform})" for d in jax.devices()))
    config = default.get_config()
    config.model.head_dim = 64
    config.model.compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    request = request_of(config, jax.default_backend())
    rng, results = np.random.default_rng(0), {}
    q, k, v = (jax.numpy.asarray(rng.standard_normal((2, 128, 4, 64)), config.model.compute_dtype) for _ in range(3))
    for name in BACKENDS:
        reason = BACKENDS[name].supports(request)
        if not reason:
            results[name] = np.asarray(jax.jit(lambda q, k, v, n=name: attend(q, k, v, backend=n))(q, k, v), np.float32)
        print(f"attention {name:8}", reason or f"ok, differs from plain by {abs(results[name] - results['plain']).max():.1e}")
    rows = []
    for _ in range(2):
        a = jax.random.normal(jax.random.key(0), (1024, 1024))
        began = time.perf_counter()
        jax.block_until_ready(jax.jit(lambda a: a @ a)(a))
        rows.append(time.perf_counter() - began)
    print(f"matmul 1024^3 float32: {2 * 1024**3 / rows[-1] / 1e9:.0f} GFLOP/s")
    print("self-test passed")


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
VERBS = {
    "train": (run_train, add_train),
    "eval": (run_eval, add_eval),
    "generate": (run_generate, add_generate),
    "data": (run_data, add_data),
    "chat": (run_chat, add_chat),
    "serve": (run_serve, add_serve),
    "plan": (run_plan, add_plan),
    "bench": (run_bench, add_bench),
    "sweep": (commands.run_sweep, commands.add_sweep),
    "report": (commands.run_report, commands.add_report),
    "convert": (run_convert, add_convert),
    "ensemble": (commands.run_ensemble, commands.add_ensemble),
    "mup": (commands.run_mup, commands.add_mup),
    "replay": (commands.run_replay, commands.add_replay),
    "average": (run_average, add_average),
    "doctor": (run_doctor, lambda verb: None),
}

if __name__ == "__main__":
    sys.exit(main())
