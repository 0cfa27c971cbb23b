"""The program of a run, not yet compiled: the very same for `train`, which runs it, `bench`, which times it, and `plan`, which
compiles it for machines that are not there."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.feed import Feed
from jaxlm.kernels.attention import choose_backend
from jaxlm.objectives.next_token import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel import target
from jaxlm.parallel.automatic import choose_axes
from jaxlm.parallel.compile import jit
from jaxlm.parallel.compiler_options import compiler_options
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding, replicated, under_mesh
from jaxlm.train.state import Model, build_init, build_model, state_shardings
from jaxlm.train.step import build_train_step

INPUTS = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
          "loss_mask": jnp.float32}  # the arrays (B, T) of a batch


class Program(NamedTuple):
    backend: str  # of attention
    why: str  # that one
    model: Model
    mesh: jax.sharding.Mesh
    objective: Callable
    train_step: Callable  # (state, batch, hyper) -> (state, metrics), not yet jitted
    init: Callable  # seed -> state, not yet jitted
    state: Any  # a ShapeDtypeStruct with its sharding for each leaf
    shardings: Any  # of the state
    hyper: dict  # numpy scalars
    feed: Feed  # of training batches
    compiler_options: dict  # of XLA
    layout: str  # why this mesh, where `mesh.auto` chose it

    @property
    def inputs(self) -> tuple:
        """A ShapeDtypeStruct with its sharding for each array that `train_step` takes: (state, batch, hyper)."""
        everywhere = replicated(self.mesh)
        batch = {name: jax.ShapeDtypeStruct(self.feed.shape, dtype, sharding=self.feed.sharding)
                 for name, dtype in INPUTS.items()}
        hyper = {name: jax.ShapeDtypeStruct((), a.dtype, sharding=everywhere) for name, a in self.hyper.items()}
        return self.state, batch, hyper

    def lower(self) -> jax.stages.Lowered:
        """`train_step` as the compiler is given it, its state donated."""
        with target.building_for(self.mesh.devices.flat[0]):
            step = jit(self.mesh, self.train_step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
            return step.lower(*self.inputs)

    def jaxpr(self):
        """Of `train_step`, all devices together."""
        with target.building_for(self.mesh.devices.flat[0]):
            return jax.make_jaxpr(under_mesh(self.mesh, self.train_step))(*self.inputs)

    def compile(self) -> tuple[Callable, float]:
        """-> the executable of `train_step`, and the seconds that tracing and compiling it took."""
        began = time.time()
        return self.lower().compile(compiler_options=self.compiler_options), time.time() - began


def build_program(config, vocab_size: int, devices=None) -> Program:
    """Compiles nothing. devices: those of this machine, or of a topology. Raises UserError: all that is wrong with parts or
    mesh."""
    devices = jax.devices() if devices is None else devices
    with target.building_for(devices[0]):
        backend, why = choose_backend(config, target.platform())
        model = build_model(config, vocab_size, backend)
        sizes, layout = choose_axes(config, vocab_size, devices) if config.mesh.auto else (None, "")
        mesh = build_mesh(config, devices, sizes)
        if mesh.shape["context"] > 1:
            backend, why = config.kernels.context, "mesh.context cuts the sequence up"
        objective = build_objective(config)
        optimizer, schedule = build_optimizer(config, model.specs), build_schedule(config)
        train_step = build_train_step(config, model, objective, optimizer, schedule)
        init = build_init(config, model, optimizer)
        state = jax.eval_shape(init, 0)
        options = compiler_options(config, mesh.devices.flat[0], mesh.size)
    shardings = state_shardings(mesh, model, state, config.mesh.zero_stage)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    hyper = {"learning_rate": np.float32(config.optimizer.learning_rate),
             "weight_decay": np.float32(config.optimizer.weight_decay), "seed": np.int32(config.seed)}
    feed = Feed(batch_sharding(mesh), (config.batch_size, config.seq_len))
    return Program(backend, why, model, mesh, objective, train_step, init, state, shardings, hyper, feed, options, layout)
