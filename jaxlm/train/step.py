"""One optimizer step, as a pure function: (state, batch, hyper) -> (state, metrics)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.moe import balance_biases, router_metrics
from jaxlm.parallel import target
from jaxlm.parallel.rules import constrain
from jaxlm.train.state import lay_out


def build_train_step(config, model, objective, optimizer, schedule):
    """-> train_step(state, batch, hyper) -> (state, metrics), to be jitted with `state` donated.

    batch: arrays (B, T), B = config.batch_size.
    hyper: traced scalars {"learning_rate", "weight_decay", "seed"}, so that an ensemble of them is one `vmap`.
    metrics: float32 scalars; loss is nats per target token over the whole batch; bad_leaf is the index (in the order of
    `flatten_paths`) of the first gradient that is not finite, -1 if all are.
    """
    accum, clip_norm = config.grad_accum_steps, config.optimizer.clip_norm
    ema_decay, dropout = config.optimizer.ema_decay, config.model.dropout
    bias_rate = config.model.bias_update_rate if config.model.feedforward == "moe" else 0.0

    def train_step(state, batch, hyper):
        params, step = state["params"], state["step"]
        keys_B = None
        if dropout:  # a key for each row of the batch, so that neither accumulation nor mesh changes what is dropped
            key = jax.random.fold_in(jax.random.key(hyper["seed"]), step)
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch["tokens"].shape[0]))

        def loss_fn(params, rows):
            micro, keys_B = rows
            micro = {name: constrain(a, "batch", "seq") for name, a in micro.items()}
            loss_sum, weight_sum, aux = objective(nnx.merge(model.graph, params), micro, keys_B=keys_B)
            return loss_sum, (weight_sum, aux)

        def gradient(params, rows):
            (_, sums), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
            return sums, lay_out(model, grads)

        if accum == 1:
            (weight, aux), grads = gradient(params, (batch, keys_B))
        else:
            # Rows are dealt out in turn, so that each micro-batch keeps the sharding of the whole.
            micros = jax.tree.map(lambda a: a.reshape(-1, accum, *a.shape[1:]).swapaxes(0, 1), (batch, keys_B))

            def accumulate(total, rows):
                sums, grads = gradient(params, rows)
                return jax.tree.map(jnp.add, total, grads), sums

            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            grads, sums = jax.lax.scan(accumulate, lay_out(model, zeros), micros)
            weight, aux = jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)

        nll = aux["nll"]
        weight = jnp.maximum(weight, 1.0)  # a batch of padding only: a zero gradient, not 0/0
        squares = jnp.stack([jnp.sum(jnp.square((g / weight).astype(jnp.float32))) for g in jax.tree.leaves(grads)])
        grad_norm = jnp.sqrt(jnp.sum(squares))
        shrink = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12)) if clip_norm else jnp.ones(())
        finite = jnp.isfinite(nll) & jnp.isfinite(grad_norm)
        learning_rate = hyper["learning_rate"] * schedule(step)

        def update(old, grads):
            grads = jax.tree.map(lambda g: g / weight * shrink.astype(g.dtype), grads)
            params, opt_state = optimizer.update(grads, old["opt_state"], old["params"], learning_rate, hyper["weight_decay"])
            if bias_rate:  # by rule, not by gradient: what the optimizer made of them is forgotten
                params = balance_biases(params, old["params"], aux["expert_counts"], bias_rate)
            new = {"params": params, "opt_state": opt_state}
            if ema_decay:
                new["ema"] = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, old["ema"], params)
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
            **router_metrics(aux, weight),
        }
        return {"step": step + 1, **new_state}, metrics

    return train_step


def build_eval_step(model, objective):
    """-> eval_step(params, batch) -> (nll_sum, weight_sum)."""

    def eval_step(params, batch):
        _, weight, aux = objective(nnx.merge(model.graph, params), batch)
        return aux["nll"], weight

    return eval_step
