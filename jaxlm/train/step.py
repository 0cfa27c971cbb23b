"""One optimizer step, as a pure function: (state, batch, hyper) -> (state, metrics); and the program of a run, which is that step
with all it is made of, not yet compiled: the very same for `train`, which runs it, `bench`, which times it, and `plan`, which
compiles it for machines that are not there."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.config import is_off
from jaxlm.data.feed import Feed
from jaxlm.errors import UserError
from jaxlm.kernels.attention import choose_backend
from jaxlm.models.moe import balance_biases, router_metrics
from jaxlm.objectives.build import build_objective
from jaxlm.objectives.objective import MEANS
from jaxlm.optimizers.build import build_optimizer
from jaxlm.optimizers.schedules import build_schedule
from jaxlm.parallel import target
from jaxlm.parallel.automatic import choose_axes
from jaxlm.parallel.compile import jit
from jaxlm.parallel.compiler_options import compiler_options
from jaxlm.parallel.mesh import build_mesh
from jaxlm.parallel.rules import batch_sharding, constrain, replicated, under_mesh
from jaxlm.stages import Stage, stages_of
from jaxlm.train.frozen import Frozen, build_frozen
from jaxlm.train.state import Model, build_init, build_model, flatten_paths, lay_out, part_of, state_shardings, with_part


def build_train_step(config, model, objective, optimizer, schedule, frozen=None, look=None):
    """-> train_step(state, batch, hyper[, own]) -> (state, metrics), to be jitted with `state` donated.

    look: (mean gradients before clipping, state, new state, aux) -> what metrics["inside"] is then (`jaxlm.observe.internals`).

    batch: arrays (B, T).
    hyper: traced scalars {"learning_rate", "weight_decay", "seed"}, so that an ensemble of them is one `vmap`.
    own: with a `frozen` model, its own parameters.
    metrics: float32 scalars; loss is nats per target token over the whole batch; bad_leaf is the index (in the order of
    `flatten_paths` of what trains) of the first gradient that is not finite, -1 if all are.
    """
    accum, clip_norm = config.grad_accum_steps, config.optimizer.clip_norm
    ema_decay, dropout = config.optimizer.ema_decay, config.model.dropout or config.model.token_dropout
    balanced = "layers/feedforward/router/bias" in flatten_paths(model.trained)
    bias_rate = config.model.bias_update_rate if balanced else 0.0

    def train_step(state, batch, hyper, own=None):
        params, step = state["params"], state["step"]
        keys_B = None
        if dropout:  # a key for each row of the batch, so that neither accumulation nor mesh changes what is dropped
            keys_B = keys_of_rows(hyper["seed"], step, batch["tokens"].shape[0])

        def loss_fn(trained, rows):
            micro, keys_B = rows
            micro = {name: constrain(a, "batch", "seq") for name, a in micro.items()}
            module = nnx.merge(model.graph, with_part(params, trained))
            loss_sum, weight_sum, aux = objective(module, micro, keys_B=keys_B, **beside(frozen, params, own))
            return loss_sum, (weight_sum, aux)

        def gradient(rows):
            (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(part_of(params, model.trained), rows)
            return sums, lay_out(model, grads)

        if accum == 1:
            (weight, aux), grads = gradient((batch, keys_B))
        else:
            # Rows are dealt out in turn, so that each micro-batch keeps the sharding of the whole.
            micros = jax.tree.map(lambda a: a.reshape(-1, accum, *a.shape[1:]).swapaxes(0, 1), (batch, keys_B))

            def accumulate(total, rows):
                sums, grads = gradient(rows)
                return jax.tree.map(jnp.add, total, grads), sums

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), part_of(params, model.trained))
            grads, sums = jax.lax.scan(accumulate, lay_out(model, zeros), micros)
            weight, aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)

        nll = aux["nll"]
        weight = jnp.maximum(weight, 1.0)  # a batch of padding only: a zero gradient, not 0/0
        squares = jnp.stack([jnp.sum(jnp.square((g / weight).astype(jnp.float32))) for g in jax.tree.leaves(grads)])
        grad_norm = jnp.sqrt(jnp.sum(squares))
        shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12)) if not is_off(clip_norm) else jnp.ones(())
        finite = jnp.isfinite(nll) & jnp.isfinite(grad_norm)
        learning_rate = hyper["learning_rate"] * schedule(step)

        def update(old, grads):
            grads = jax.tree.map(lambda g: g / weight * shrink.astype(g.dtype), grads)
            trained, opt_state = optimizer.update(grads, old["opt_state"], part_of(old["params"], model.trained), learning_rate,
                                                  hyper["weight_decay"])
            if bias_rate:  # by rule, not by gradient: what the optimizer made of them is forgotten
                trained = balance_biases(trained, old["params"], aux["expert_counts"], bias_rate)
            new = {"params": with_part(old["params"], trained), "opt_state": opt_state}
            if not is_off(ema_decay):
                averages = part_of(old["ema"], model.trained)
                averages = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, averages, trained)
                new["ema"] = with_part(old["ema"], averages)
            return new

        # A bad update never reaches the state, whatever the policy: the device decides, the host hears of it later. An
        # accelerator fuses a select into the update, where a branch would wait for the host; a CPU would copy all moments.
        old = {name: value for name, value in state.items() if name != "step"}
        if target.platform() == "cpu":
            new_state = jax.lax.cond(finite, update, lambda old, grads: old, old, grads)
        else:
            new_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(old, grads), old)
        bad = ~jnp.isfinite(squares)
        metrics = {
            "loss": nll / weight,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "tokens": weight,
            "finite": finite,
            "bad_leaf": jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
            **router_metrics(aux, weight), **{name: aux[name] / weight for name in MEANS if name in aux},
        }
        if look:
            metrics["inside"] = look(jax.tree.map(lambda g: g / weight, grads), old, new_state, aux)
        return {"step": step + 1, **new_state}, metrics

    return train_step


def keys_of_rows(seed, step, rows: int):
    """-> keys_B of dropout."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def build_eval_step(model, objective, frozen=None):
    """-> eval_step(params, batch[, own]) -> {"nll", "weight" and what else the objective tells: scalars}, sums."""

    def eval_step(params, batch, own=None):
        _, weight, aux = objective(nnx.merge(model.graph, params), batch, **beside(frozen, params, own))
        return {"weight": weight, **{name: value for name, value in aux.items() if not value.ndim}}

    return eval_step


def beside(frozen: Frozen | None, params, own) -> dict:
    """What an objective is given besides."""
    return {"frozen": frozen.module(params, own)} if frozen else {}


# ---- The program --------------------------------------------------------------------------------------------------------------


INPUTS = {"tokens": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
          "loss_mask": jnp.float32}  # the arrays (B, T) of a batch
SOURCE_INPUTS = {"source_tokens": jnp.int32, "source_segment_ids": jnp.int32, "source_positions": jnp.int32}  # (B, S)


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
    source_len: int  # S of SOURCE_INPUTS, which the batches of an encoder-decoder have; 0: they have none
    layout: str  # why this mesh, where `mesh.auto` chose it
    frozen: Frozen | None  # what the objective looks at beside the model
    frozen_inputs: tuple  # (a ShapeDtypeStruct with its sharding for each parameter of its own,), or ()
    build_step: Callable  # (look=...) -> a `train_step` that looks at itself

    @property
    def inputs(self) -> tuple:
        """A ShapeDtypeStruct with its sharding for each array that `train_step` takes: (state, batch, hyper), and
        the parameters of `frozen` where it is there."""
        everywhere = replicated(self.mesh)
        B, T = self.feed.shape
        arrays = [(name, dtype, T) for name, dtype in INPUTS.items()]
        arrays += [(name, dtype, self.source_len) for name, dtype in SOURCE_INPUTS.items()] if self.source_len else []
        batch = {name: jax.ShapeDtypeStruct((B, length), dtype, sharding=self.feed.sharding) for name, dtype, length in arrays}
        hyper = {name: jax.ShapeDtypeStruct((), a.dtype, sharding=everywhere) for name, a in self.hyper.items()}
        return self.state, batch, hyper, *self.frozen_inputs

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


def build_programs(config, vocab_size: int) -> dict[Stage, Program]:
    """Of each stage of the run; the last is `build_program`'s own. Raises UserError, as it does, by stage."""
    *stages, last = stages_of(config)
    programs, run = {}, build_program(config, vocab_size)
    for stage in stages:
        try:
            programs[stage] = build_program(config, vocab_size, stage=stage)
        except UserError as error:
            raise UserError(*(f"stages: until step {stage.end}: {problem}" for problem in error.problems)) from error
    return {**programs, last: run}


def batches_of(batches, programs: dict[Stage, Program], start: int):
    """Of `programs`, from the state after `start` steps on, made ahead on their devices. Close it to end its thread."""
    *stages, last = programs
    for stage in stages:
        if start < stage.end:
            feed = programs[stage].feed
            yield from batches.prefetched(max(start, stage.first), feed.put, feed.rows, stage.end)
    yield from batches.prefetched(max(start, last.first), programs[last].feed.put, programs[last].feed.rows)


def build_program(config, vocab_size: int, devices=None, stage: Stage | None = None) -> Program:
    """Compiles nothing. devices: those of this machine, or of a topology. stage: whose batch and rows it takes; None: the run's
    own. Raises UserError: all that is wrong with parts or mesh."""
    devices = jax.devices() if devices is None else devices
    shaped = stage.view(config) if stage else config  # the parameters are those of the whole run
    with target.building_for(devices[0]):
        backend, why = choose_backend(shaped, target.platform())
        model = build_model(config, vocab_size, backend)
        sizes, layout = choose_axes(config, vocab_size, devices) if config.mesh.auto else (None, "")
        mesh = build_mesh(shaped, devices, sizes)
        if mesh.shape["context"] > 1:
            backend, why = config.kernels.context, "mesh.context cuts the sequence up"
        objective = build_objective(config)
        optimizer, schedule = build_optimizer(config, model.trained), build_schedule(config)
        frozen = build_frozen(config, objective, model)
        build_step = functools.partial(build_train_step, config, model, objective, optimizer, schedule, frozen)
        train_step = build_step()
        init = build_init(config, model, optimizer)
        state = jax.eval_shape(init, 0)
        options = compiler_options(config, mesh.devices.flat[0], mesh.size)
    shardings = state_shardings(mesh, model, state, config.mesh.zero_stage)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
    hyper = {"learning_rate": np.float32(config.optimizer.learning_rate),
             "weight_decay": np.float32(config.optimizer.weight_decay), "seed": np.int32(config.seed)}
    feed = Feed(batch_sharding(mesh), (shaped.batch_size, shaped.seq_len))
    return Program(backend, why, model, mesh, objective, train_step, init, state, shardings, hyper, feed, options,
                   config.data.source_len if config.model.family == "encoder_decoder" else 0, layout, frozen,
                   (frozen.abstract(mesh, config.mesh.zero_stage),) if frozen else (), build_step)
