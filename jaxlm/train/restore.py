"""A finished or running run, or Hugging Face weights, opened for use: config, model and newest parameters."""

import json
import os
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxlm.errors import UserError


class Run(NamedTuple):
    config: ConfigDict
    model: Any  # jaxlm.train.state.Model
    params: Any
    data: Any  # jaxlm.data.loader.Data
    mesh: Any
    step: int


def config_of_run(workdir: str, overrides=()) -> ConfigDict:
    """The config stored in `workdir`, on top of today's defaults. Raises UserError if there is none."""
    from configs import default
    from jaxlm.config import apply_overrides
    from jaxlm.validation import validate

    file = pathlib.Path(workdir, "config.json")
    if not file.is_file():
        raise UserError(f"--workdir={workdir}: no config.json there; give the directory of a training run")
    config = default.get_config()
    config.update(as_tuples(json.loads(file.read_text())["config"]))
    config.lock()
    apply_overrides(config, overrides)
    validate(config)
    return config


def as_tuples(value):
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(as_tuples(v) for v in value) if isinstance(value, list) else value


def mesh_here(config, vocab_size: int, overrides=()):
    """The mesh of the config, or of `overrides`; where the config's own does not fit the devices that there are, one that does,
    and the config says so then."""
    import jax

    from configs import default
    from jaxlm.parallel.automatic import choose_axes
    from jaxlm.parallel.mesh import axis_sizes, build_mesh, mesh_problems

    devices = jax.devices()
    asked = any(o.startswith("--config.mesh") for o in overrides)
    if not asked and mesh_problems(config, axis_sizes(config, len(devices)), len(devices)):
        config.mesh = default.get_config().mesh
        config.mesh.auto = True
    return build_mesh(config, devices, choose_axes(config, vocab_size, devices)[0] if config.mesh.auto else None)


def open_run(workdir: str, overrides=(), frugal: bool = False, text: bool = True, checkpoint: str = "") -> Run:
    """What `workdir` or, where that is empty, --config.model.from_pretrained among `overrides` names, a jaxlm run or Hugging
    Face weights, as it can be read here: on the mesh of `overrides`, or the one it was trained on, or, where that does not fit
    the devices that there are, one that does. Nothing is written.

    frugal, text: as `Checkpoints` and `build_data` have them. checkpoint: of a run, as `choose_step` has it. Raises UserError.
    """
    key = "--config.model.from_pretrained="
    if not workdir:
        names = [o.removeprefix(key) for o in overrides if o.startswith(key)]
        if not names:
            raise UserError(f"give --workdir=DIR of a run, or {key}DIR of a run or of Hugging Face weights")
        overrides = [o for o in overrides if not o.startswith(key)]
        if not os.path.isdir(os.path.join(names[-1], "checkpoints")):
            return open_hugging_face(names[-1], overrides, text)
        workdir = names[-1]
    config = config_of_run(workdir, overrides)
    import jax

    from jaxlm.checkpoint.manager import Checkpoints
    from jaxlm.train.state import is_spec, parameter_shardings

    data, model, mesh = build_here(config, overrides, text)
    abstract = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), model.specs,
                            parameter_shardings(mesh, model, config.mesh.zero_stage), is_leaf=is_spec)
    directory = os.path.join(workdir, "checkpoints")
    if not os.path.isdir(directory):
        raise UserError(f"--workdir={workdir}: no checkpoints there yet; train first")
    checkpoints = Checkpoints(directory, config.checkpoint.keep, 0, False, create=False, frugal=frugal, metric=config.eval.metric)
    if checkpoints.latest() is None:
        raise UserError(f"--workdir={workdir}: no checkpoint there yet; train first")
    step = choose_step(checkpoints, checkpoint or ("best" if config.checkpoint.keep_best else "latest"))
    params = checkpoints.restore_params(abstract, "ema" if config.optimizer.ema_decay else "params", step)
    step = checkpoints.latest() if step is None else step
    checkpoints.close()
    return Run(config, model, params, data, mesh, step)


def choose_step(checkpoints, name: str) -> int | None:
    """"best" by eval.metric (of runs with checkpoint.keep_best; the newest, where there was no evaluation), "latest", or a step;
    None: the newest that is whole. Raises UserError: no such checkpoint."""
    if name == "latest" or name == "best" and checkpoints.best() is None:
        return None
    if name == "best":
        return checkpoints.best()
    if not name.isdigit() or int(name) not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps()))
        raise UserError(f"--checkpoint={name}: no such checkpoint; give best, latest or one of {there}")
    return int(name)


def open_hugging_face(name: str, overrides, text: bool) -> Run:
    from jaxlm.huggingface.load import load_params, open_source

    source = open_source(name, overrides)
    if not os.path.isfile(source.config.data.tokenizer) and not any(o.startswith("--config.data.tokenizer=") for o in overrides):
        raise UserError(f"{name}: has no tokenizer.json, so nothing tells how text is cut; put it there, or give "
                        "--config.data.tokenizer")
    data, model, mesh = build_here(source.config, overrides, text)
    return Run(source.config, model, load_params(source, model, mesh), data, mesh, 0)


def build_here(config, overrides, text: bool):
    """-> (data, model, mesh)"""
    from jaxlm.data.loader import build_data
    from jaxlm.kernels.attention import choose_backend
    from jaxlm.parallel import target
    from jaxlm.train.state import build_model

    data = build_data(config, text)
    model = build_model(config, data.vocab_size, choose_backend(config, target.platform())[0])
    return data, model, mesh_here(config, data.vocab_size, overrides)
