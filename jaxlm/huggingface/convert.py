"""`jaxlm convert`: a Hugging Face folder becomes a run directory, a run directory a Hugging Face folder.

    <workdir>/huggingface/   of a converted run: what came with the weights (config.json, tokenizer, generation settings)
"""

import json
import os
import pathlib
import shutil

import jax

from jaxlm.checkpoint.chunks import StepWriter
from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.config import fingerprint
from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.errors import UserError
from jaxlm.huggingface.adapter import merge_adapters, save_adapter
from jaxlm.huggingface.hub import local_folder
from jaxlm.huggingface.load import find, is_hugging_face, open_source, write_params
from jaxlm.huggingface.save import config_extras, save
from jaxlm.huggingface.tensors import parse_json
from jaxlm.models.families.family import MODEL_TYPES, family_of
from jaxlm.observe.throughput import peak_process_bytes
from jaxlm.parallel.distributed import is_main, share
from jaxlm.train.restore import config_of_run, open_run
from jaxlm.train.rundir import open_run_directory
from jaxlm.train.state import build_model, flatten_paths, size_of

KEPT = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")


def say(text: str) -> None:
    if is_main():
        print(text)


def import_run(folder: str, workdir: str, overrides=()) -> None:
    """Raises UserError: not a checkpoint of a family that jaxlm has, or a work directory that is taken."""
    source = open_source(folder, overrides)
    share(lambda: check_empty(workdir), "empty work directory")
    folder = source.folder
    config, vocab_size = source.config, source.config.model.vocab_size
    config.data.tokenizer = tokenizer_of(folder, workdir, vocab_size)
    config.data.source = "files" if config.data.tokenizer != "byte" else "synthetic"
    model = build_model(config, vocab_size, "plain")
    specs = flatten_paths(model.specs)
    places, found = find(source, specs)
    try:
        share(lambda: open_run_directory(workdir, config, False, {}), "run directory")
        share(lambda: keep_files(folder, workdir), "files beside the weights")
        checkpoints = Checkpoints(os.path.join(workdir, "checkpoints"), config.checkpoint.keep, 0, False)
        checkpoints.require_room([jax.ShapeDtypeStruct(spec.shape, spec.dtype) for spec in specs.values()])
        writer = StepWriter(checkpoints.directory, 0)
        prints = write_params(specs, places, found, writer)
        leaves = {f"params/{path}": {"shape": list(spec.shape), "dtype": str(spec.dtype), "fingerprint": prints[path]}
                  for path, spec in specs.items()}
        writer.publish({"fingerprint": fingerprint(config), "step": 0, "leaves": leaves})
    except BaseException as error:
        if is_main():
            make_empty(workdir)  # as it was: the same command can be given again
        if isinstance(error, OSError):
            raise UserError(f"--workdir={workdir}: saving failed ({error.strerror}); free space or choose another") from error
        raise
    size = sum(size_of(s) * s.dtype.itemsize for s in specs.values())
    say(f"{workdir}: {source.family.model_type}, {model.num_parameters:,} parameters in {config.model.param_dtype} "
        f"({size / 1e9:.2f} GB), seq_len {config.seq_len}; peak host memory {peak_process_bytes() / 1e9:.2f} GB")


def check_empty(workdir: str) -> None:
    if os.path.isdir(workdir) and os.listdir(workdir):
        raise UserError(f"--workdir={workdir}: is not empty; use another")


def make_empty(workdir: str) -> None:
    for path in pathlib.Path(workdir).glob("*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def tokenizer_of(folder: str, workdir: str, vocab_size: int) -> str:
    """Where tokenizer.json will lie, or "byte" where there is none. Raises UserError: it has more ids than the embedding."""
    file = pathlib.Path(folder, "tokenizer.json")
    if not file.is_file():
        say(f"{folder}: has no tokenizer.json; the run gets bytes, which are not what the model was trained on")
        return "byte"
    size = HuggingFaceTokenizer(file.read_text()).vocab_size
    if size > vocab_size:
        raise UserError(f"{file}: has {size} ids, config.json says vocab_size={vocab_size}; they do not belong together")
    return os.path.join(os.path.abspath(workdir), "huggingface", "tokenizer.json")


def keep_files(folder: str, workdir: str) -> None:
    kept = pathlib.Path(workdir, "huggingface")
    kept.mkdir()
    for name in KEPT:
        if (file := pathlib.Path(folder, name)).is_file():
            shutil.copyfile(file, kept / name)


def origin(workdir: str) -> pathlib.Path | None:
    """The folder with what came with the weights that the run started from, however many runs ago."""
    seen = set()
    while workdir and workdir not in seen:
        seen.add(workdir)
        workdir = local_folder(workdir)
        if is_hugging_face(workdir):
            return pathlib.Path(workdir)
        if (kept := pathlib.Path(workdir, "huggingface")).is_dir():
            return kept
        workdir = config_of_run(workdir).model.from_pretrained if os.path.isfile(os.path.join(workdir, "config.json")) else ""
    return None


def export_run(workdir: str, folder: str, overrides=(), family_name: str = "", adapter: bool = False) -> None:
    """The run's whole model, its adapters added to the kernels; adapter: the adapters alone, in PEFT's form. Raises UserError as
    `save` and `save_adapter` do."""
    run, kept = open_run(workdir, overrides, frugal=True, text=False), origin(workdir)
    run.config.model.vocab_size = run.data.vocab_size
    values = parse_json(kept / "config.json") if kept else {}
    if family_name:
        family = MODEL_TYPES[family_name]
    else:
        family = MODEL_TYPES[values["model_type"]] if values else family_of(run.config)
    if adapter:
        save_adapter(folder, family, run.config, run.model, run.params, run.config.model.from_pretrained)
        say(f"{folder}: the adapters of step {run.step}, of rank {run.config.model.lora_rank}, in PEFT's form")
        return
    files = {name: (kept / name).read_bytes() for name in KEPT if kept and name != "config.json" and (kept / name).is_file()}
    if not kept:
        values, files = own_files(run.data.tokenizer)
    config, model, params = merge_adapters(run.config, run.model, run.params)
    difference = save(folder, family, config, model, params, run.mesh, config_extras(values), files)
    missing = "" if "tokenizer.json" in files else "; without a tokenizer: the run's own has no such form"
    say(f"{folder}: {family.model_type}, {model.num_parameters:,} parameters of step {run.step}; read again, its logits "
        f"differ by {difference:.1e}{missing}")


def own_files(tokenizer) -> tuple[dict, dict]:
    """(fields of config.json, files) of a run that did not start from Hugging Face's weights."""
    as_text = lambda value: json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    ids = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    files = {"generation_config.json": as_text({name: i for name, i in ids.items() if i is not None})}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        end = None if tokenizer.eos_id is None else tokenizer.inner.id_to_token(tokenizer.eos_id)
        files["tokenizer.json"] = tokenizer.inner.to_str()
        files["tokenizer_config.json"] = as_text({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end,
                                                  "bos_token": end, "clean_up_tokenization_spaces": False})
    return ids, files
