"""Configs: load a file, apply `--config.a.b=value`, diff, fingerprint, and find keys that no code reads.

No JAX in this file: a wrong key must be reported before JAX starts.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import pathlib
import re
import traceback

from ml_collections import ConfigDict

from jaxlm.errors import UserError
from jaxlm.registry import did_you_mean

# Where and how a run writes and watches, and what changes only its speed and memory; two runs that differ only here are the
# same experiment.
NOT_IDENTITY = ("observe", "checkpoint", "data.store_dir", "data.root", "data.prefetch", "data.workers", "prepare", "mesh",
                "grad_accum_steps", "model.remat", "model.scan_layers", "model.scan_unroll", "kernels.compiler_options",
                "kernels.fused_projections", "eval.tasks", "eval.lm_eval", "eval.lm_eval_path", "eval.lm_eval_chat",
                "eval.task_limit")


def load(spec: str, overrides: list[str] = ()) -> ConfigDict:
    """`configs/shakespeare.py[:arg]` plus `["--config.steps=50", ...]` -> locked, resolved ConfigDict.

    Raises UserError with every problem found, one line each.
    """
    from jaxlm.validation import validate  # which needs this file

    path, _, arg = spec.partition(":")
    config = call(path, module_of(path).get_config, arg)
    config.lock()
    first = tuple(f"--config.{key}=" for key in ("model.from_pretrained", "model.adapter", "objective.teacher", "imports"))
    apply_overrides(config, [o for o in overrides if o.startswith(first)])
    if problems := import_parts(config.imports):
        raise UserError(*problems)
    take_from_pretrained(config)
    apply_overrides(config, overrides)
    resolve(config)
    validate(config)
    return config


def module_of(path: str):
    """The config file at `path` as a module. Raises UserError: no such file, or a mistake in it."""
    file = pathlib.Path(path)
    if not file.is_file():
        found = sorted(str(p) for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        hint = did_you_mean(path, found) if found else "give the path of a config file"
        raise UserError(f"--config={path}: no such file; {hint}")
    module_spec = importlib.util.spec_from_file_location(f"jaxlm_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    call(path, module_spec.loader.exec_module, module)
    return module


def call(path: str, function, *args):
    """-> function(*args), which is the user's, of the config file at `path`: any mistake in it is a UserError with its line."""
    try:
        return function(*args)
    except UserError:
        raise
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(f"{path}: {type(error).__name__} at {line.filename}:{line.lineno}: {error}; mend it") from error


def take_from_pretrained(config: ConfigDict) -> None:
    """Where `model.from_pretrained` is a Hugging Face folder or repository, or a run made of one, its config.json says what the
    model is, and its tokenizer.json how text is cut, in place; `model.adapter` says what the adapters are. A tokenizer that
    another run made of its text is taken from there, and the teacher's."""
    for place in (config.objective.teacher, config.model.from_pretrained):
        if place and (file := pathlib.Path(place, "tokenizer.json")).is_file():
            config.data.tokenizer = str(file)
    folder = hugging_face_folder(config.model.from_pretrained)
    if folder is None:
        if config.model.adapter:
            raise UserError(f"model.adapter={config.model.adapter}: is for model.from_pretrained=DIR of Hugging Face, or of a "
                            "run made of one; set it")
        return
    from jaxlm.models.families import apply, read_folder

    seq_len = config.seq_len
    family, keys = read_folder(folder)
    apply(config, keys)
    if keys["model.position"] != "learned":
        config.seq_len = seq_len  # rope takes any length; learned positions have theirs
    if (folder / "tokenizer.json").is_file():
        config.data.tokenizer = str(folder / "tokenizer.json")
    if config.model.adapter:
        from jaxlm.huggingface.adapter import apply_adapter

        apply_adapter(config, family)


def hugging_face_folder(path: str) -> pathlib.Path | None:
    """What `model.from_pretrained` names, if it is a Hugging Face folder or repository, or a run made of one; None for other
    runs."""
    if not path or "://" in path:  # a run elsewhere
        return None
    from jaxlm.huggingface.hub import local_folder

    folder = pathlib.Path(local_folder(path))
    if not (folder / "checkpoints").is_dir():
        return folder
    return folder / "huggingface" if (folder / "huggingface").is_dir() else None


def split_override(override: str) -> tuple[str, str, str]:
    """ "--config.a.b=c" -> ("a.b", "=", "c"). `--config.mesh=auto` is short for `--config.mesh.auto=True`."""
    parts = override.removeprefix("--config.").partition("=")
    return ("mesh.auto", "=", "True") if parts == ("mesh", "=", "auto") else parts


def apply_overrides(config: ConfigDict, overrides: list[str]) -> None:
    problems = []
    for override in overrides:
        name, equals, text = split_override(override)
        if not override.startswith("--config.") or not equals:
            problems.append(f"{override}: unknown argument; config keys are set with --config.key=value")
            continue
        *groups, leaf = name.split(".")
        node, known = config, True
        for group in groups:
            known = known and group in node and isinstance(node[group], ConfigDict)
            node = node[group] if known else node
        if not known or leaf not in node or isinstance(node[leaf], ConfigDict):
            problems.append(f"--config.{name}: unknown key; {did_you_mean(name, flatten(config))}")
            continue
        kind = node.get_type(leaf)
        try:
            node[leaf] = parse_value(text, kind)
        except (ValueError, SyntaxError, TypeError):
            want = {"object": "a number of steps, '5%' or '20M tokens'"}.get(kind.__name__, f"{kind.__name__}")
            problems.append(f"--config.{name}={text}: wrong type; give {want}, such as {node[leaf]!r}")
    if problems:
        raise UserError(*problems)


def parse_value(text: str, kind: type):
    if kind is str:
        return text
    if kind is object:  # a duration
        return int(text) if re.fullmatch(r"\d+", text) else text
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower()) if text.lower() in (
            "true", "false", "0", "1") else _refuse(text)
    value = ast.literal_eval(text)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e6
    if type(value) is not kind:
        _refuse(text)
    return value


def _refuse(text):
    raise ValueError(text)


BALANCED = ("balanced",)  # as objective.class_weights: `settle_class_weights` puts numbers in its place


def settle_class_weights(config: ConfigDict, counts) -> None:
    """In place, objective.class_weights of ("balanced",) by the training examples of each class (`loader.Data`): n / (k count),
    as scikit-learn's class_weight="balanced". A run's stored config has the numbers. Raises UserError: a class without examples.
    """
    if config.objective.class_weights != BALANCED:
        return
    for name, count in zip(config.data.classes, counts, strict=True):
        if not count:
            raise UserError(f"objective.class_weights={BALANCED}: class {name!r} has no training examples; give numbers, or "
                            "leave the class out")
    config.objective.class_weights = tuple(sum(counts) / (len(counts) * count) for count in counts)


def resolve(config: ConfigDict) -> None:
    """Fill in what follows from other keys (0 means "derive"), in place."""
    m = config.model
    if not m.head_dim and m.num_heads and m.embed_dim % m.num_heads == 0:
        m.head_dim = m.embed_dim // m.num_heads
    m.num_kv_heads = m.num_kv_heads or m.num_heads
    m.mlp_dim = m.mlp_dim or 4 * m.embed_dim
    m.router_choice_bias |= m.feedforward == "moe" and m.bias_update_rate > 0
    config.eval.batch_size = config.eval.batch_size or config.batch_size
    config.checkpoint.keep_best |= config.eval.patience > 0
    d = config.data
    if m.family == "encoder_decoder":
        d.source_len = d.source_len or config.seq_len
    if d.form != "text":  # examples stay whole, and do not see one another
        d.isolate_documents, d.packing = True, "best_fit" if d.packing == "concat" else d.packing
        d.prompt = d.prompt or (f"{{{d.text_field}}}" if d.form == "label" else "{prompt}")
        d.target = d.target or "{target}"
    if config.objective.name == "classification":
        m.num_classes = m.num_classes or len(d.classes)


def import_parts(names) -> list[str]:
    """Import what registers out-of-tree parts -> problems."""
    problems = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            problems.append(f"imports: cannot import {name!r} ({error}); put its folder on PYTHONPATH")
    return problems


def layer_period(m) -> int:
    """Layers after which the kinds of layers come again."""
    return math.lcm(len(m.window_pattern or "G"), len(m.rope_pattern or "R"))


def rotated_size(m) -> int:
    """Of head_dim, what rope rotates."""
    return int(m.head_dim * m.rope_fraction)


def is_off(value) -> bool:
    """A number of a config that is 0, and so leaves its part out; one that is traced (of an ensemble's member) never does."""
    return isinstance(value, int | float) and value == 0


def nearest_multiple(value: int, factor: int) -> int:
    return max(factor, round(value / factor) * factor)


def steps_of(value, config: ConfigDict, key: str) -> int:
    """A duration in optimizer steps: 100 (steps), "5%" (of the run), "20M tokens"."""
    if isinstance(value, int):
        steps = value
    elif match := re.fullmatch(r"([\d.]+)\s*%", str(value)):
        steps = round(config.steps * float(match[1]) / 100)
    elif (tokens := tokens_in(value)) is not None:
        if config.stages:
            raise UserError(f"{key}={value!r}: with stages, steps differ in tokens; give steps, or a share of the run")
        steps = max(1, round(tokens / (config.batch_size * config.seq_len)))
    else:
        raise UserError(f"{key}={value!r}: give a number of steps, a share of the run ('5%') or '20M tokens'")
    if steps < 0:
        raise UserError(f"{key}={value!r}: must not be negative")
    return steps


def tokens_in(value) -> float | None:
    """"20M tokens" -> 2e7; None of another duration."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([KMBT]?)\s*tokens", str(value))
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]] if match else None


def flatten(config) -> dict:
    """{"model.embed_dim": 128, ...}, leaves only; takes a ConfigDict or a nested dict."""
    out = {}
    for key, value in (config.items() if hasattr(config, "items") else ()):
        if isinstance(value, (ConfigDict, dict)):
            out.update({f"{key}.{k}": v for k, v in flatten(value).items()})
        else:
            out[key] = list(value) if isinstance(value, tuple) else value
    return out


def identity(config) -> dict:
    return {k: v for k, v in flatten(config).items() if not any(k == n or k.startswith(n + ".") for n in NOT_IDENTITY)}


def fingerprint(config) -> str:
    """16 hex digits that name the experiment: all keys but paths, logging, saving and the mesh."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def diff(old, new) -> list[str]:
    """Lines `key: old -> new` for the keys of the experiment that differ; takes configs or nested dicts. A key that an older
    version wrote nothing of counts as its default, which is what that version did."""
    from configs import default

    plain = lambda config: json.loads(json.dumps(identity(config)))
    defaults, old, new = plain(default.get_config()), plain(old), plain(new)
    keys = sorted(set(old) | set(new))
    missing = "(absent)"
    old = {k: defaults[k] for k in keys if k not in old and k in defaults} | old
    return [f"{k}: {old[k] if k in old else missing} -> {new[k] if k in new else missing}"
            for k in keys if k not in old or k not in new or old[k] != new[k]]


class Tracked:
    """A read-only view of a config that remembers which leaves were read.

    The train loop builds everything from one of these; `unread` then names the keys that were set but do nothing.
    """

    def __init__(self, config: ConfigDict, prefix: str = "", reads: set | None = None):
        object.__setattr__(self, "_config", config)
        object.__setattr__(self, "_prefix", prefix)
        object.__setattr__(self, "reads", set() if reads is None else reads)

    def __getattr__(self, name):
        value = self._config[name]
        path = self._prefix + name
        if isinstance(value, ConfigDict):
            return Tracked(value, path + ".", self.reads)
        self.reads.add(path)
        return value

    def __setattr__(self, name, value):
        raise AttributeError(f"configs are read-only while running: {self._prefix}{name}")

    def unread(self, default: ConfigDict, overrides: list[str] = ()) -> list[str]:
        """Keys whose value differs from the default's, yet no code read them.

        A choice among `overrides` (["--config.optimizer.name=sgd"]) excuses what the config file set in that group, such
        as keys of the optimizer it would have used; it never excuses another override.
        """
        mine, base = flatten(self._config), flatten(default)
        given = {split_override(override)[0] for override in overrides}
        rechosen = {key.rpartition(".")[0] for key in given if isinstance(mine[key], str) or key == "mesh.auto"}
        return [f"{k}={mine[k]!r}: is set, but nothing in this run reads it; remove it, or choose the part that uses it"
                for k in mine if k not in self.reads and (k not in base or mine[k] != base[k])
                and not k.startswith("prepare.")  # another verb's: one file may say how data is cleaned and what trains on it
                and (k in given or k.rpartition(".")[0] not in rechosen)]


def plain(config) -> ConfigDict:
    """What a `Tracked` looks at; what is read of that, counts as read by none."""
    return config._config if isinstance(config, Tracked) else config


class View:
    """A config with other values, {"data.path": "a.txt", ...}, in place of some of its own; `reads` gets those that are read."""

    def __init__(self, config, values: dict, prefix: str = "", reads: set | None = None):
        self._config, self._values, self._prefix, self._reads = config, values, prefix, set() if reads is None else reads

    def __getattr__(self, name):
        path = self._prefix + name
        if path in self._values:
            self._reads.add(path)
            return self._values[path]
        value = getattr(self._config, name)
        group = isinstance(value, ConfigDict | Tracked | View)
        return View(value, self._values, path + ".", self._reads) if group else value
