"""`jaxlm generate`, `jaxlm chat`, `jaxlm serve`."""

import json
import os
import pathlib

from jaxlm.errors import UserError
from jaxlm.verbs.arguments import add_checkpoint, add_model
from jaxlm.verbs.start import cache_dir, start_alone, start_jax


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
