"""A model that does not train, which the objective looks at beside the one that does: the reference of DPO, a teacher.

It is no part of the state: it is read again at each start, and a checkpoint tells by its fingerprints that it is still the same.
An objective that wants one says so by its attribute `needs`, "reference" or "teacher", and takes it as `frozen`.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxlm.checkpoint.fingerprints import fingerprints
from jaxlm.checkpoint.manager import Checkpoints
from jaxlm.data.tokenizer_files import open_tokenizer
from jaxlm.data.tokenizers import TOKENIZERS
from jaxlm.errors import UserError
from jaxlm.kernels.attention import choose_backend
from jaxlm.parallel import target
from jaxlm.registry import Registry
from jaxlm.train.pretrained import pretrained_params
from jaxlm.train.restore import config_of_run
from jaxlm.train.state import Model, build_model, is_spec, parameter_shardings, part_of, with_part

FROZEN = Registry("frozen model", key="the objective's needs")


class Frozen(NamedTuple):
    config: Any  # that says its shape
    model: Model  # its specs are those of its own parameters
    matmul_parameters: int  # of its forward pass, those in common included (`Model.num_matmul_parameters`)
    shared: bool  # what it has no parameters of its own for, it has in common with the model in training
    load: Callable  # (program, config, abstract) -> its own parameters

    def module(self, params, own):
        return nnx.merge(self.model.graph, with_part(params, own) if self.shared else own)

    def abstract(self, mesh, zero_stage: int):
        """A ShapeDtypeStruct with its sharding for each of its own parameters."""
        shardings = parameter_shardings(mesh, self.model, zero_stage)
        return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), self.model.specs,
                            shardings, is_leaf=is_spec)


def build_frozen(config, objective, model: Model) -> Frozen | None:
    """What `objective` looks at beside `model`; None: nothing. Raises UserError: a teacher that is none for this model."""
    return FROZEN[objective.needs](config, model) if hasattr(objective, "needs") else None


def read_frozen(program, config) -> tuple:
    """(parameters,) of the frozen model on the program's mesh; () where there is none: what goes to the step after the others."""
    frozen = program.frozen
    return (frozen.load(program, config, frozen.abstract(program.mesh, config.mesh.zero_stage)),) if frozen else ()


def frozen_of_run(run, objective) -> tuple[Frozen | None, tuple]:
    """Of a finished run that is opened again -> (frozen model, what `read_frozen` says)."""
    from jaxlm.train.step import build_program

    if not hasattr(objective, "needs"):
        return None, ()
    program = build_program(run.config, run.data.vocab_size)
    return program.frozen, read_frozen(program, run.config)


def check_frozen(meta: dict, frozen: tuple, config) -> list[int]:
    """Fingerprints for the next checkpoints. meta: of the one that was restored, {} at the start. Raises UserError: the frozen
    model is another than that run's."""
    marks = fingerprints(frozen)
    if "frozen" in meta and meta["frozen"] != marks:
        raise UserError(f"{config.objective.teacher or config.model.from_pretrained}: is no longer what it was when this run "
                        "began, and the objective compares with it; put it back, or use another --workdir")
    return marks


@FROZEN.register("reference")
def reference(config, model: Model) -> Frozen:
    """What trains, as the run began with it: a copy of all parameters, or, with adapters, of these alone."""

    def load(program, config, abstract):
        shardings = program.shardings["params"]
        params = jax.jit(lambda seed: program.init(seed)["params"], out_shardings=shardings)(config.seed)
        if config.model.from_pretrained:
            params, _ = pretrained_params(program, config, params)
        return part_of(params, model.trained)

    return Frozen(config, model._replace(specs=model.trained), model.num_matmul_parameters, True, load)


@FROZEN.register("teacher")
def teacher(config, model: Model) -> Frozen:
    """Of objective.teacher, a run or a Hugging Face folder."""
    folder = config.objective.teacher
    if os.path.isdir(os.path.join(folder, "checkpoints")):
        of_teacher = config_of_run(folder)
        checkpoints = Checkpoints(os.path.join(folder, "checkpoints"), 1, 0, False, create=False)
        tree = "ema" if of_teacher.optimizer.ema_decay else "params"
        vocab_size = checkpoints.leaves()[f"{tree}/embedding"]["shape"][0]
        name = os.path.join(folder, "tokenizer.json")
        name = name if os.path.isfile(name) else of_teacher.data.tokenizer
        load = lambda program, config, abstract: checkpoints.restore_params(abstract, name=tree)
    else:
        from jaxlm.huggingface.load import load_params, open_source

        source = open_source(folder)
        of_teacher, vocab_size = source.config, source.config.model.vocab_size
        name = os.path.join(source.folder, "tokenizer.json")
        name = name if os.path.isfile(name) else source.folder
        load = lambda program, config, abstract: load_params(source, other, program.mesh)
    if problems := unlike(config, of_teacher, vocab_size, model, name):
        raise UserError(*(f"objective.teacher={folder}: {problem}" for problem in problems))
    of_teacher.seq_len, of_teacher.data.isolate_documents = config.seq_len, config.data.isolate_documents
    of_teacher.model.compute_dtype, of_teacher.model.dropout = config.model.compute_dtype, 0.0
    of_teacher.kernels.attention, of_teacher.kernels.context = config.kernels.attention, config.kernels.context
    for key in ("pipeline_microbatches", "pipeline_repeats", "zero_stage"):
        of_teacher.mesh[key] = getattr(config.mesh, key)
    other = build_model(of_teacher, vocab_size, choose_backend(of_teacher, target.platform())[0])
    return Frozen(of_teacher, other, other.num_matmul_parameters, False, load)


def unlike(config, of_teacher, vocab_size: int, model: Model, name: str) -> list[str]:
    """Why what the teacher says means nothing to the model in training."""
    problems, mine = [], model.specs["embedding"].shape[0]
    if of_teacher.model.family != "decoder" or of_teacher.model.num_classes:
        problems.append(f"is of model.family={of_teacher.model.family}; it must tell the next token")
    if of_teacher.model.position == "learned" and of_teacher.seq_len < config.seq_len:
        problems.append(f"has positions up to {of_teacher.seq_len}; use seq_len={of_teacher.seq_len}")
    if config.data.source == "files" and not same_tokenizer(name, config.data.tokenizer):
        problems.append(f"its tokenizer is another than data.tokenizer={config.data.tokenizer}; use data.tokenizer={name}")
    elif vocab_size != mine:
        problems.append(f"has {vocab_size} words and the model here {mine}; use model.vocab_size={vocab_size}")
    return problems


PROBE = "The quick brown fox, don't you know: 3.14 naïve 模型\n\tif x_BTD:\n"


def same_tokenizer(name: str, other: str) -> bool:
    """By what they make of a text; of one that is not made yet, by its name."""
    if name == other:
        return True
    if not all(os.path.exists(n) or n == "byte" for n in (name, other)):
        return False
    one, two = (TOKENIZERS[n]() if n == "byte" else open_tokenizer(n) for n in (name, other))
    try:
        return one.vocab_size == two.vocab_size and list(one.encode(PROBE)) == list(two.encode(PROBE))
    except UserError:  # characters that one of them does not have
        return one.to_json() == two.to_json()
