"""jaxlm -> Hugging Face: a whole folder, read again and compared with the live model before it gets its name."""

import concurrent.futures
import functools
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.checkpoint.files import sync
from jaxlm.config import layer_period
from jaxlm.errors import UserError
from jaxlm.huggingface.load import has_params, load_params, open_source
from jaxlm.huggingface.mapping import places_of, tensors_of
from jaxlm.huggingface.tensors import THREADS, Planned, write_shards
from jaxlm.kernels.attention import choose_backend
from jaxlm.models.families.family import NOT_ARCHITECTURE, Family, write_config
from jaxlm.parallel import target
from jaxlm.parallel.compile import jit
from jaxlm.parallel.distributed import gather, is_main, num_processes, share
from jaxlm.parallel.rules import BATCH, replicated
from jaxlm.train.heap import give_back_freed_memory
from jaxlm.train.rundir import write_json
from jaxlm.train.state import build_model, flatten_paths

SHARD_BYTES = 5 * 10**9
CHECKED_TOKENS = 16
TOLERANCE = 1e-5  # of the largest logit
# XLA on a CPU multiplies bfloat16 in float32, and would make numbers of that of all layers before the loop over them.
LAYER_BY_LAYER = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
HEADS = {"pooled": "pooler", "classes": "classifier"}  # method of an encoder: the part that it needs


def save(folder: str, family: Family, config, model, params, mesh, extras: dict, files: dict[str, str | bytes],
         shard_bytes: int = SHARD_BYTES) -> float:
    """Write `folder`, which must not be there yet or be empty. -> the largest difference of its logits from the live model's.

    `params` may be deleted, see `compare`. All processes call it; the first one writes.
    extras: fields of config.json beside those of the architecture. files: {name: contents}, such as the tokenizer's.
    Raises UserError: the family has no such model, the disk is full, the folder is taken, or what was written is not the model;
    then nothing is left under that name.
    """
    target_folder = pathlib.Path(os.path.abspath(folder))
    share(lambda: check_free(folder, target_folder), "free folder")
    values = write_config(family, config)
    longest = "max_position_embeddings"
    if longest in values and longest in extras:
        values[longest] = max(values[longest], extras[longest])
    values = {**extras, **values, "torch_dtype": config.model.param_dtype}
    specs, arrays = flatten_paths(model.specs), flatten_paths(params)
    places = places_of(family, specs, config, specs["embedding"].shape[0])
    types = {path: type_there(array, config.model.param_dtype) for path, array in arrays.items()}
    everywhere = jit(mesh, lambda array, index: array[index], out_shardings=replicated(mesh))

    def in_host_memory(array, index):
        if array.is_fully_addressable and len(array.addressable_shards) == 1 and jax.default_backend() == "cpu":
            return np.asarray(array)[index]  # a view
        return np.asarray(everywhere(array, index).addressable_data(0))

    numbers = lambda path, index: in_host_memory(arrays[path], index)
    planned = [Planned(name, types[t.parts[0][0]], t.shape, functools.partial(t.join, numbers))
               for name, t in tensors_of(places, specs).items()]
    threads = 1 if num_processes() > 1 else THREADS  # several processes send each other the tensors, all in the same order
    temporary = target_folder.with_name(f".{target_folder.name}.tmp{share(os.getpid, 'process id')}")

    def write():
        if not is_main():
            for tensor in planned:
                tensor.make()
            return
        temporary.mkdir(parents=True)
        need, free = sum(t.bytes for t in planned), shutil.disk_usage(temporary).free
        if free < need:
            raise UserError(f"--to={folder}: takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free space or choose "
                            "another place")
        write_shards(temporary, planned, shard_bytes, threads, lambda path: disk.submit(sync, path))
        for name, contents in files.items():
            (temporary / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
        write_json(temporary / "config.json", values)

    try:
        with concurrent.futures.ThreadPoolExecutor(1) as beside, concurrent.futures.ThreadPoolExecutor(1) as disk:
            writing = beside.submit(write)
            if num_processes() > 1:
                writing.result()  # what the processes send each other has one order
            length = min(CHECKED_TOKENS, config.seq_len)
            model, answers = build_answers(config, specs["embedding"].shape[0], mesh, length)
            live = answers(params)
            give_back_freed_memory()
            if not all(np.isfinite(logits).all() for logits in live):
                raise UserError("the model's own logits are not finite; nothing was published")
            writing.result()
            gather(None, "written")
            synced = [disk.submit(sync, path) for path in temporary.iterdir()] if is_main() else []
            difference = compare(str(temporary), config, model, answers, live, params, mesh, numbers, threads)
            for path in synced:
                path.result()
        gather(None, "compared")
        if is_main():
            if target_folder.exists():
                target_folder.rmdir()
            temporary.rename(target_folder)
    except OSError as error:
        raise UserError(f"--to={folder}: writing failed ({error.strerror}); free space or choose another place") from error
    finally:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
    return difference


def check_free(folder: str, target_folder: pathlib.Path) -> None:
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise UserError(f"--to={folder}: is there already; choose another folder, or remove it")


def type_there(array, param_dtype: str):
    """`param_dtype`, but for what is kept in float32 here (a router) and has numbers that only float32 holds."""
    wanted = jnp.dtype(param_dtype)
    exact = array.dtype == wanted or bool(jnp.all(array.astype(wanted).astype(array.dtype) == array))
    return wanted if exact else array.dtype


def build_answers(config, vocab_size: int, mesh, length: int):
    """-> (model, params -> what each of its heads answers to so many tokens). Its layers are in a loop, if they can be: XLA on a
    CPU may hold work space for all unrolled ones at once."""
    config = config.copy_and_resolve_references()
    m = config.model
    m.scan_layers = (m.num_layers - m.first_dense_layers) % layer_period(m) == 0
    model = build_model(config, vocab_size, choose_backend(config, target.platform())[0])
    shape = math.prod(mesh.shape[axis] for axis in BATCH), length
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)

    def run(params, tokens):
        module = nnx.merge(model.graph, params)
        about = {"memory": module.encode(tokens)} if hasattr(module, "encode") else {}
        x_BTD = module.hidden(tokens, **about)[0]
        heads = [getattr(module, head) for head, part in HEADS.items() if hasattr(module, part)]
        return [head(x_BTD) for head in (module.logits, *heads)]

    compiled = jit(mesh, run, out_shardings=replicated(mesh), compiler_options=LAYER_BY_LAYER)
    return model, lambda params: [np.asarray(answer.addressable_data(0)) for answer in compiled(params, tokens)]


def compare(folder: str, config, model, answers, live: list, params, mesh, numbers, threads: int) -> float:
    """The largest difference between the logits of `folder`, read as anybody's, and the live model's: none where it is the same
    program and every parameter the same, bit for bit. Else `params` are deleted, as those that are read take their place.

    model, answers: of `build_answers`; live: what it answered. numbers: of `params`, as `has_params` asks for them. Raises
    UserError: the difference is more than rounding.
    """
    again = open_source(folder)
    for key in ("compute_dtype", "param_dtype"):
        again.config.model[key] = config.model[key]
    again.config.seq_len = max(again.config.seq_len, config.seq_len)  # which longrope looks at
    other, answers_of_other = build_answers(again.config, flatten_paths(params)["embedding"].shape[0], mesh, live[0].shape[1])
    if other.graph == model.graph:
        if all(gather(has_params(again, other, numbers, threads), "whether it is the same")):
            return 0.0
        answers_of_other = answers
    theirs = answers_of_other(load_params(again, other, mesh, instead_of=params))
    differences = []
    for ours, others in zip(live, theirs, strict=True):
        differences.append(float(np.abs(ours - others).max()))
        if not differences[-1] <= TOLERANCE * float(np.abs(ours).max()):
            raise UserError(f"the written folder's logits differ from the model's by {differences[-1]:.2e}; nothing was "
                            "published. This is a defect of the family's table: please report it")
    return max(differences)


def config_extras(values: dict) -> dict:
    """Of a source's config.json, what is kept beside what jaxlm says: ids of special tokens, training settings."""
    dropped = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"}
    kept = (NOT_ARCHITECTURE - dropped) | {"max_position_embeddings", "intermediate_size"}
    return {name: value for name, value in values.items() if name in kept}
