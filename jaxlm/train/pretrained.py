"""The parameters that a run starts with, of a jaxlm run or a Hugging Face folder: all of them, or what this model shares with it.

What the other model has besides is not taken. What this one has besides must be named by `model.from_scratch`, or be adapters.
A vocabulary of another size keeps the rows that both have; new rows are the mean of the old ones, as transformers begins them.
"""

import os
import re

import jax
import jax.numpy as jnp

from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.config import hugging_face_folder
from jaxlm.errors import UserError
from jaxlm.parallel.rules import rules_of_parameters, sharding_of
from jaxlm.train.state import ADAPTER, build_model, flatten_paths, is_spec, with_part, without


def pretrained_params(program, config, fresh):
    """-> (parameters on the mesh of `program`, lines that say what was not taken).

    fresh: those that the run would start with by itself. Raises UserError: no such folder, parameters that it has not, or has in
    another shape.
    """
    folder, specs = config.model.from_pretrained, flatten_paths(program.model.specs)
    skipped = {path for path in specs if starts_fresh(config, path)}
    if config.model.from_scratch and not any(re.fullmatch(config.model.from_scratch, path) for path in specs):
        raise UserError(f"model.from_scratch={config.model.from_scratch!r} matches no parameter; there are "
                        f"{', '.join(list(specs)[:8])}, ...")
    taken, lines = shared_params(program, config, skipped)
    if fresh_ones := sorted(path for path in skipped if not re.fullmatch(ADAPTER, path)):
        lines.append("from scratch: " + ", ".join(fresh_ones))
    params = with_part(fresh, taken)
    if config.model.adapter:
        from jaxlm.huggingface.adapter import read_adapter
        from jaxlm.models.families import read_folder

        family, _ = read_folder(hugging_face_folder(folder))
        params = with_part(params, read_adapter(config, program.model, program.mesh, family, params))
    return params, lines


def shared_params(program, config, skipped: set):
    """-> (what this model has in common with the other, but for `skipped`, in its own shapes and types, lines of what was not
    taken). program: whatever has a model, its mesh and its attention backend."""
    folder = config.model.from_pretrained
    read = read_run if os.path.isdir(os.path.join(folder, "checkpoints")) else read_hugging_face
    specs, rules = flatten_paths(program.model.specs), rules_of_parameters(config.mesh.zero_stage)
    lay = lambda spec, shape: sharding_of(program.mesh, spec.axes, shape, rules)
    taken, lines = read(program, config, folder, skipped, lay)

    def as_here(path, array):
        spec = specs[jax.tree_util.keystr(path, simple=True, separator="/")]
        if array.shape != spec.shape:
            fit = jax.jit(fit_vocabulary, static_argnums=(1, 2), out_shardings=lay(spec, spec.shape))
            array = fit(array, spec.axes, spec.shape)
        return array.astype(spec.dtype)

    return jax.tree_util.tree_map_with_path(as_here, taken), lines


def starts_fresh(config, path: str) -> bool:
    try:
        return bool(re.fullmatch(config.model.from_scratch, path)) or bool(re.fullmatch(ADAPTER, path))
    except re.error as error:
        raise UserError(f"model.from_scratch={config.model.from_scratch!r} is no regex: {error}") from error


def fit_vocabulary(array, axes: tuple, shape: tuple):
    """The parameter with as many words as `shape` says along its axis "vocab"."""
    axis = axes.index("vocab")
    old, new = array.shape[axis], shape[axis]
    if new < old:
        return jax.lax.slice_in_dim(array, 0, new, axis=axis)
    mean = jnp.mean(array.astype(jnp.float32), axis=axis, keepdims=True).astype(array.dtype)
    return jnp.concatenate([array, jnp.repeat(mean, new - old, axis=axis)], axis=axis)


def read_run(program, config, folder: str, skipped: set, lay):
    """Adapters too, where the run has the same."""
    specs = flatten_paths(program.model.specs)
    checkpoints = Checkpoints(os.path.join(folder, "checkpoints"), 1, 0, False, create=False)
    saved = {path.removeprefix("params/"): leaf for path, leaf in checkpoints.leaves().items() if path.startswith("params/")}
    skipped = {path for path in skipped if not (re.fullmatch(ADAPTER, path) and path in saved)}

    def wanted(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, dtype = spec.shape, spec.dtype
        if name in saved:
            dtype = saved[name]["dtype"]
            if "vocab" in spec.axes:
                axis = spec.axes.index("vocab")
                shape = (*shape[:axis], saved[name]["shape"][axis], *shape[axis + 1:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=lay(spec, shape))

    abstract = jax.tree_util.tree_map_with_path(wanted, without(program.model.specs, skipped), is_leaf=is_spec)
    params = checkpoints.restore_params(abstract)
    checkpoints.close()
    spare = sorted(set(saved) - set(specs))
    return params, [f"not taken from {folder}: {', '.join(spare)}"] if spare else []


def read_hugging_face(program, config, folder: str, skipped: set, lay):
    from jaxlm.huggingface.load import load_params, open_source
    from jaxlm.huggingface.mapping import places_of, tensors_of

    source = open_source(folder)
    vocab_size = source.config.model.vocab_size
    own = flatten_paths(build_model(source.config, vocab_size, program.backend).specs)
    spare = set(tensors_of(places_of(source.family, own, source.config, vocab_size), own))

    def as_there(spec):
        shape = tuple(vocab_size if axis == "vocab" else n for axis, n in zip(spec.axes, spec.shape, strict=True))
        return spec._replace(shape=shape)

    specs = jax.tree.map(as_there, without(program.model.specs, skipped), is_leaf=is_spec)
    params = load_params(source._replace(config=config), program.model._replace(specs=specs), program.mesh, vocab_size, spare)
    spare = sorted(set(own) - set(flatten_paths(program.model.specs)))
    return params, [f"not taken from {folder}: {', '.join(spare)}"] if spare else []
