"""From a config to the program that trains: `train` runs it, `bench` times it, so both have the very same one."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.feed import Feed, put_everywhere
from jaxlm.data.loader import Data, build_data
from jaxlm.kernels.attention import choose_backend
from jaxlm.objectives.next_token import build_objective
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding, replicated, under_mesh
from jaxlm.train.state import Model, build_init, build_model, state_shardings
from jaxlm.train.step import build_train_step


class Program(NamedTuple):
    data: Data
    backend: str  # of attention
    why: str  # that one
    model: Model
    mesh: jax.sharding.Mesh
    objective: Callable
    train_step: Callable  # (state, batch, hyper) -> (state, metrics), not yet jitted
    init: Callable  # seed -> state, not yet jitted
    state: Any  # a ShapeDtypeStruct with its sharding for each leaf
    shardings: Any  # of the state
    hyper: dict  # scalars on the devices
    feed: Feed  # of training batches

    def compile(self) -> tuple[Callable, float]:
        """-> the executable of `train_step`, its state donated, and the seconds that tracing and compiling it took."""
        batch = {name: jax.ShapeDtypeStruct(self.feed.shape, jnp.float32 if name == "loss_mask" else jnp.int32,
                                            sharding=self.feed.sharding)
                 for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask")}
        began = time.time()
        step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))
        return step.lower(self.state, batch, self.hyper).compile(), time.time() - began


def build_program(config) -> Program:
    """Compiles nothing. Raises UserError: all that is wrong with data, parts or mesh."""
    data = build_data(config)
    backend, why = choose_backend(config, jax.default_backend())
    model = build_model(config, data.vocab_size, backend)
    mesh = build_mesh(config, model.num_parameters)
    if mesh.shape["context"] > 1:
        backend, why = config.kernels.context, "mesh.context cuts the sequence up"
    objective = build_objective(config)
    optimizer, schedule = build_optimizer(config, model.specs), build_schedule(config)
    train_step = under_mesh(mesh, build_train_step(config, model, objective, optimizer, schedule))
    init = build_init(config, model, optimizer)
    state = jax.eval_shape(init, 0)
    shardings = state_shardings(mesh, model, state, config.mesh.zero_stage)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    hyper = put_everywhere({"learning_rate": np.float32(config.optimizer.learning_rate),
                            "weight_decay": np.float32(config.optimizer.weight_decay),
                            "seed": np.int32(config.seed)}, replicated(mesh))
    feed = Feed(batch_sharding(mesh), (config.batch_size, config.seq_len))
    return Program(data, backend, why, model, mesh, objective, train_step, init, state, shardings, hyper, feed)
