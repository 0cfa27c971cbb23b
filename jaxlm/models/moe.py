"""Mixture of experts (Shazeer et al., arXiv:1701.06538): a router sends each token to a few of many feed-forwards.

Auxiliary losses are sums over rows: each row (sequence) has its own, weighted in the objective by its target tokens, so that
they do not depend on how the batch is cut up. Padding counts nowhere.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.kernels.grouped_matmul import choose_grouped_matmul, grouped_matmul
from jaxlm.models.dense import adapter, adapter_scale
from jaxlm.models.feedforward import FEEDFORWARDS, FORMS, FeedForward, activate
from jaxlm.models.parameter import constant, parameter
from jaxlm.parallel import target
from jaxlm.parallel.expert import KERNEL_AXES, best_groups, choose, dispatch, gather
from jaxlm.parallel.rules import constrain, mesh_size


class Stats(NamedTuple):
    """What a layer's router did with each row; stacked over layers, each has a leading L."""

    load_balance_B: Any  # 1 where all experts are used alike (DeepSeek-V3, arXiv:2412.19437, eq. 17-20, without its alpha)
    router_z_B: Any  # mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5)
    counts_BE: Any  # int32: tokens that chose each expert


@FEEDFORWARDS.register("moe")
class MixtureOfExperts(nnx.Module):
    def __init__(self, config, rngs, inits):
        m = config.model
        self.capacity_factor = m.capacity_factor if m.routing == "capacity" else None
        self.router = Router(config, rngs, inits)
        self.experts = Experts(config, rngs, inits)
        if m.shared_experts:
            self.shared = FeedForward(config, rngs, inits, m.expert_form, m.shared_experts * m.mlp_dim)

    def __call__(self, x_BTD, context):
        """-> (x_BTD, Stats). Padding gets zeros from the routed experts."""
        live_BT = jnp.ones(x_BTD.shape[:2], bool) if context.live is None else context.live
        choices_BTK, weights_BTK, stats = self.router(x_BTD, live_BT)
        # Decoding sees one token at a time, so it cannot know how full an expert is: it drops none.
        if self.capacity_factor is None or context.decoding:
            choices_BTK = jnp.where(live_BT[..., None], choices_BTK, self.experts.number)  # padding goes to none
            y_BTD = dispatch(self.experts.run, x_BTD, choices_BTK, weights_BTK, self.experts.kernels)
        else:
            y_BTD = self.experts.by_capacity(x_BTD, choices_BTK, weights_BTK, live_BT, context.order, self.capacity_factor)
        return y_BTD + self.shared(x_BTD)[0] if hasattr(self, "shared") else y_BTD, stats


class Limit(NamedTuple):
    """Of the groups of experts that a token may go to; see `best_groups`."""

    groups: int
    kept: int
    best: int


class Router(nnx.Module):
    """Scores in float32; ties go to the expert with the lower number."""

    def __init__(self, config, rngs, inits):
        m = config.model
        self.score, self.normalize, self.experts_per_token = m.router_score, m.router_normalize, m.experts_per_token
        self.scale, self.limit = m.router_scale, None
        if m.router_groups > 1:
            self.limit = Limit(m.router_groups, m.router_groups_per_token, m.router_group_best)
        self.kernel = parameter(rngs, (m.embed_dim, m.num_experts), ("embed", None), inits.hidden(m.embed_dim), num_inputs=1)
        if m.router_bias:
            self.logit_bias = parameter(rngs, (m.num_experts,), (None,), constant(0.0))
        if m.router_choice_bias or m.bias_update_rate:
            self.bias = parameter(rngs, (m.num_experts,), (None,), constant(0.0))

    def __call__(self, x_BTD, live_BT):
        """-> (choices_BTK, weights_BTK float32, Stats). The bias has a say in the choice, not in the weights."""
        kernel_DE = constrain(self.kernel[...], None, None)
        logits_BTE = jnp.einsum("BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE, precision="highest")
        if hasattr(self, "logit_bias"):
            logits_BTE = logits_BTE + self.logit_bias[...]
        scores_BTE = jax.nn.softmax(logits_BTE) if self.score == "softmax" else jax.nn.sigmoid(logits_BTE)
        preferred_BTE = jax.lax.stop_gradient(scores_BTE + self.bias[...] if hasattr(self, "bias") else scores_BTE)
        limit = partial(best_groups, **self.limit._asdict()) if self.limit else None
        choices_BTK = choose(preferred_BTE, self.experts_per_token, limit)
        weights_BTK = jnp.take_along_axis(scores_BTE, choices_BTK, axis=-1)
        if self.normalize:
            weights_BTK = weights_BTK / (jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20)
        if self.scale != 1.0:
            weights_BTK = weights_BTK * self.scale
        return choices_BTK, weights_BTK, self.stats(logits_BTE, scores_BTE, choices_BTK, live_BT)

    def stats(self, logits_BTE, scores_BTE, choices_BTK, live_BT):
        E, K = logits_BTE.shape[-1], choices_BTK.shape[-1]
        counts_BE = jnp.sum(chosen(choices_BTK, live_BT, E), axis=1, dtype=jnp.int32)
        tokens_B1 = jnp.maximum(jnp.sum(live_BT, axis=1, keepdims=True), 1)
        share_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
        mean_BE = jnp.sum(jnp.where(live_BT[..., None], share_BTE, 0), axis=1) / tokens_B1
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
        return Stats(jnp.sum(E / K * counts_BE / tokens_B1 * mean_BE, axis=-1),
                     jnp.sum(jnp.where(live_BT, z_BT, 0), axis=1) / tokens_B1[:, 0], counts_BE)


def chosen(choices_BTK, live_BT, num_experts: int):
    """-> bool BTE: the token is no padding and chose the expert."""
    return jnp.any(choices_BTK[..., None] == jnp.arange(num_experts), axis=2) & live_BT[..., None]


class Experts(nnx.Module):
    """Kernels of all experts, stacked: E matrices of a kind."""

    def __init__(self, config, rngs, inits):
        m = config.model
        E, D, F = m.num_experts, m.embed_dim, m.mlp_dim
        self.number = E
        self.activation, gated = FORMS[m.expert_form]
        self.adapter_scale = adapter_scale(m)
        self.backend, _ = choose_grouped_matmul(config, target.platform())
        share = m.experts_per_token / E
        for name in ("up", "gate", "down") if gated else ("up", "down"):
            shape, init = ((E, F, D), inits.output(F)) if name == "down" else ((E, D, F), inits.hidden(D))
            axes, module = KERNEL_AXES[name], f"feedforward.experts.{name}"
            made = nnx.Dict(kernel=parameter(rngs, shape, axes, init, m.param_dtype, num_inputs=1, share=share),
                            **adapter(m, rngs, module, shape[1:2], shape[2:], axes, (E,), share))
            if m.mlp_bias:
                made["bias"] = parameter(rngs, (E, shape[-1]), KERNEL_AXES[f"{name}_bias"], constant(0.0), m.param_dtype,
                                         share=share)
            setattr(self, name, made)

    @property
    def kernels(self) -> dict:
        """And biases and adapters, by the names of `KERNEL_AXES`."""
        layers = {name: getattr(self, name) for name in ("up", "gate", "down") if hasattr(self, name)}
        name_of = lambda name, part: name if part == "kernel" else f"{name}_{part}"
        return {name_of(name, part): value[...] for name, layer in layers.items() for part, value in layer.items()}

    def hidden(self, product, kernels):
        """product: name of a kernel -> x times it."""
        gate = (product("gate"),) if "gate" in kernels else ()
        return activate(self.activation, *gate, product("up"))

    def adapt(self, name: str, kernels: dict, y, x, multiply):
        """y, the product of x with the kernel `name`, with its adapter's added to it. multiply: (name, kernel, x) -> product."""
        if f"{name}_lora_a" not in kernels:
            return y
        low = multiply(f"{name}_lora_a", kernels[f"{name}_lora_a"], x)
        return y + multiply(f"{name}_lora_b", kernels[f"{name}_lora_b"], low) * self.adapter_scale

    def run(self, rows_XD, sizes_E, kernels):
        """Rows in the order of their experts, sizes_E of each; see `grouped_matmul`."""

        @partial(jax.checkpoint, static_argnums=0)  # the gradient gathers the kernel again, rather than keep it whole
        def multiply(name, kernel, rows):
            backend = "ragged_dot" if "lora" in name and self.backend == "gmm" else self.backend  # a rank is no whole tile
            return grouped_matmul(rows, gather(name, kernel.astype(rows.dtype)), sizes_E, backend=backend)

        def product(name, rows):
            y = self.adapt(name, kernels, multiply(name, kernels[name], rows), rows, multiply)
            bias = f"{name}_bias"
            return y + bias_of_rows(bias, kernels[bias].astype(y.dtype), sizes_E, len(y)) if bias in kernels else y

        return product("down", self.hidden(lambda name: product(name, rows_XD), kernels))

    def by_capacity(self, x_BTD, choices_BTK, weights_BTK, live_BT, order_T, factor: float):
        """GShard's form (arXiv:2006.16668): each expert has ceil(factor * T * K / E) places in each row, taken in the order of
        the tokens, so that no token depends on a later one; a token that finds none is passed by."""
        T, E = x_BTD.shape[1], self.number
        places = min(T, math.ceil(factor * T * choices_BTK.shape[-1] / E))
        chosen_BTE = constrain(chosen(choices_BTK, live_BT, E), "batch", None, None).astype(jnp.int32)
        if order_T is None:
            before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
        else:
            before_BTE = jnp.cumsum(chosen_BTE[:, np.argsort(order_T)], axis=1)[:, order_T] - chosen_BTE
        send_BTEC = (before_BTE[..., None] == jnp.arange(places)) & (chosen_BTE > 0)[..., None]
        send_BTEC = constrain(send_BTEC, "batch", "seq", None, None)
        weight_BTE = jnp.sum(jnp.where(choices_BTK[..., None] == jnp.arange(E), weights_BTK[..., None], 0), axis=2)
        # On a mesh: kernels gathered over `embed`, rows moved to the devices of their expert and back.
        kernels = {name: constrain(kernel.astype(x_BTD.dtype), *(None if a == "embed" else a for a in KERNEL_AXES[name]))
                   for name, kernel in self.kernels.items()}
        lay = lambda a, last: constrain(a, "expert", "expert_batch", None, last)
        x_EBCD = lay(jnp.einsum("BTEC,BTD->EBCD", send_BTEC.astype(x_BTD.dtype), x_BTD), None)
        add_bias = lambda name, y: y + kernels[name][:, None, None] if name in kernels else y
        multiply = lambda name, kernel, x: jnp.einsum("EBCD,EDF->EBCF", x, kernel)

        def product(name, x):
            return add_bias(f"{name}_bias", self.adapt(name, kernels, multiply(name, kernels[name], x), x, multiply))

        h_EBCF = self.hidden(lambda name: lay(product(name, x_EBCD), "mlp"), kernels)
        y_EBCD = lay(product("down", h_EBCF), None)
        back_BTEC = jnp.where(send_BTEC, weight_BTE[..., None], 0).astype(x_BTD.dtype)
        return constrain(jnp.einsum("BTEC,EBCD->BTD", back_BTEC, y_EBCD), "batch", "seq", None)


def bias_of_rows(name: str, bias_EF, sizes_E, rows: int):
    """-> (X, F), of each row's expert; zeros for rows of none. Under a tensor-parallel mesh, each device has a share of the sum
    that `down` is, and one adds its bias."""
    if name == "down_bias" and mesh_size("tensor") > 1:
        bias_EF = jnp.where(jax.lax.axis_index("tensor") == 0, bias_EF, 0)
    expert_X = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(rows), side="right")
    return bias_EF.at[expert_X].get(mode="fill", fill_value=0)


# ---- For objectives and the train step --------------------------------------------------------------------------------------


ROUTER_METRICS = ("load_balance_loss", "router_z_loss", "expert_load_max")


def describe_experts(config, platform: str) -> list[str]:
    """A line for the start of a run; none for a dense model."""
    m = config.model
    if m.feedforward != "moe":
        return []
    backend, why = choose_grouped_matmul(config, platform)
    shared = f" and {m.shared_experts} shared" if m.shared_experts else ""
    return [f"experts: {m.num_experts}{shared}, {m.experts_per_token} a token, {m.routing}; grouped matmul: {backend} ({why})"]


def build_router_loss(config):
    """-> router_loss(stats of all layers, weight_B) -> (loss_sum, aux), both sums over rows of weight_B; zero and {} for stats of
    None. The loss is summed over layers, aux averaged over them; aux["expert_counts"] is (L, E)."""
    moe = config.model.feedforward == "moe"
    balance, z = (config.model.load_balance_weight, config.model.router_z_weight) if moe else (0.0, 0.0)

    def router_loss(stats, weight_B):
        if stats is None:
            return 0.0, {}
        # Sums, not products: a matrix unit would round the weights.
        load_balance_L = jnp.sum(stats.load_balance_B * weight_B, axis=-1)
        router_z_L = jnp.sum(stats.router_z_B * weight_B, axis=-1)
        return balance * jnp.sum(load_balance_L) + z * jnp.sum(router_z_L), {
            "load_balance_loss": jnp.mean(load_balance_L), "router_z_loss": jnp.mean(router_z_L),
            "expert_counts": jnp.sum(stats.counts_BE, axis=1)}

    return router_loss


def router_metrics(aux: dict, weight) -> dict:
    """Of the sums of a whole step; expert_load_max is the fullest expert of any layer, as a multiple of an equal share."""
    if "expert_counts" not in aux:
        return {}
    counts_LE = aux["expert_counts"].astype(jnp.float32)
    load_LE = counts_LE / jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1)
    return {"load_balance_loss": aux["load_balance_loss"] / weight, "router_z_loss": aux["router_z_loss"] / weight,
            "expert_load_max": jnp.max(load_LE)}


def balance_biases(params: dict, old: dict, counts_LE, rate: float) -> dict:
    """`params` with the routers' biases of `old` moved by `rate`: up for experts with fewer tokens than the mean, down for those
    with more (Wang et al., arXiv:2408.15664)."""
    counts_LE = counts_LE.astype(jnp.float32)
    bias_LE = old["layers"]["feedforward"]["router"]["bias"]
    bias_LE = bias_LE + rate * jnp.sign(jnp.mean(counts_LE, axis=-1, keepdims=True) - counts_LE)
    feedforward = params["layers"]["feedforward"]
    feedforward = {**feedforward, "router": {**feedforward["router"], "bias": bias_LE}}
    return {**params, "layers": {**params["layers"], "feedforward": feedforward}}
