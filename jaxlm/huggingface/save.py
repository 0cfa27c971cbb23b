"""jaxlm -> Hugging Face: a whole folder, read again and compared with the live model before it gets its name."""

import functools
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.errors import UserError
from jaxlm.huggingface.load import load_params, open_source
from jaxlm.huggingface.mapping import places_of, tensors_of
from jaxlm.huggingface.tensors import Planned, write_shards
from jaxlm.kernels.attention import choose_backend
from jaxlm.models.families.family import NOT_ARCHITECTURE, Family, write_config
from jaxlm.parallel import target
from jaxlm.parallel.compile import jit
from jaxlm.parallel.distributed import num_processes
from jaxlm.parallel.rules import BATCH
from jaxlm.train.rundir import write_json
from jaxlm.train.state import build_model, flatten_paths

SHARD_BYTES = 5 * 10**9
CHECKED_TOKENS = 256
TOLERANCE = 1e-5  # of the largest logit
HEADS = {"pooled": "pooler", "classes": "classifier"}  # method of an encoder: the part that it needs


def save(folder: str, family: Family, config, model, params, mesh, extras: dict, files: dict[str, str | bytes],
         shard_bytes: int = SHARD_BYTES) -> float:
    """Write `folder`, which must not be there yet or be empty. -> the largest difference of its logits from the live model's.

    extras: fields of config.json beside those of the architecture. files: {name: contents}, such as the tokenizer's.
    Raises UserError: the family has no such model, the disk is full, the folder is taken, or what was written is not the model;
    then nothing is left under that name.
    """
    if num_processes() > 1:
        raise UserError("--to: writing a Hugging Face folder is the work of one process; run it in one")
    target_folder = pathlib.Path(os.path.abspath(folder))
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise UserError(f"--to={folder}: is there already; choose another folder, or remove it")
    values = write_config(family, config)
    longest = "max_position_embeddings"
    if longest in values and longest in extras:
        values[longest] = max(values[longest], extras[longest])
    values = {**extras, **values, "torch_dtype": config.model.param_dtype}
    specs, arrays = flatten_paths(model.specs), flatten_paths(params)
    places = places_of(family, specs, config, specs["embedding"].shape[0])
    types = {path: type_there(array, config.model.param_dtype) for path, array in arrays.items()}

    dtype = lambda tensor: types[tensor.parts[0][0]]
    planned = [Planned(name, dtype(t), t.shape, functools.partial(t.join, arrays, dtype(t)))
               for name, t in tensors_of(places, specs).items()]
    temporary = target_folder.with_name(f".{target_folder.name}.tmp{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        need, free = sum(t.bytes for t in planned), shutil.disk_usage(temporary).free
        if free < need:
            raise UserError(f"--to={folder}: takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; free space or choose "
                            "another place")
        write_shards(temporary, planned, shard_bytes)
        for name, contents in files.items():
            (temporary / name).write_bytes(contents.encode() if isinstance(contents, str) else contents)
        write_json(temporary / "config.json", values)
        difference = compare(str(temporary), config, model, params, mesh)
        if target_folder.exists():
            target_folder.rmdir()
        temporary.rename(target_folder)
    except OSError as error:
        raise UserError(f"--to={folder}: writing failed ({error.strerror}); free space or choose another place") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def type_there(array, param_dtype: str):
    """`param_dtype`, but for what is kept in float32 here (a router) and has numbers that only float32 holds."""
    wanted = jnp.dtype(param_dtype)
    exact = array.dtype == wanted or bool(jnp.all(array.astype(wanted).astype(array.dtype) == array))
    return wanted if exact else array.dtype


def compare(folder: str, config, model, params, mesh) -> float:
    """The largest difference between the logits of `folder`, read as anybody's, and the live model's. Raises UserError: it is
    more than rounding."""
    again = open_source(folder)
    for key in ("compute_dtype", "param_dtype", "scan_layers"):
        again.config.model[key] = config.model[key]
    again.config.seq_len = max(again.config.seq_len, config.seq_len)  # which longrope looks at
    vocab_size = flatten_paths(model.specs)["embedding"].shape[0]
    other = build_model(again.config, vocab_size, choose_backend(again.config, target.platform())[0])
    shape = math.prod(mesh.shape[axis] for axis in BATCH), min(CHECKED_TOKENS, config.seq_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)

    def answers(model, params):
        def run(params, tokens):
            module = nnx.merge(model.graph, params)
            about = {"memory": module.encode(tokens)} if hasattr(module, "encode") else {}
            x_BTD = module.hidden(tokens, **about)[0]
            heads = [getattr(module, head) for head, part in HEADS.items() if hasattr(module, part)]
            return [head(x_BTD) for head in (module.logits, *heads)]

        return jax.tree.map(np.asarray, jit(mesh, run)(params, tokens))

    differences = [0.0]
    for mine, theirs in zip(answers(model, params), answers(other, load_params(again, other, mesh)), strict=True):
        differences.append(float(np.abs(mine - theirs).max()))
        if not np.isfinite(mine).all():
            raise UserError("the model's own logits are not finite; nothing was published")
        if not differences[-1] <= TOLERANCE * float(np.abs(mine).max()):
            raise UserError(f"the written folder's logits differ from the model's by {differences[-1]:.2e}; nothing was "
                            "published. This is a defect of the family's table: please report it")
    return max(differences)


def config_extras(values: dict) -> dict:
    """Of a source's config.json, what is kept beside what jaxlm says: ids of special tokens, training settings."""
    dropped = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"}
    kept = (NOT_ARCHITECTURE - dropped) | {"max_position_embeddings", "intermediate_size"}
    return {name: value for name, value in values.items() if name in kept}
