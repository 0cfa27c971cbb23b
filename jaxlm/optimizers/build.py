"""Optimizers. A registered one is an optax transform without learning rate, clipping or weight decay: those are added
here, once for all, with a group of (learning-rate, weight-decay) multipliers per parameter."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.errors import UserError
from jaxlm.models.parameter import ParamSpec
from jaxlm.models.parametrization import build_parametrization, of_parameters
from jaxlm.optimizers.muon import muon
from jaxlm.registry import Registry

OPTIMIZERS = Registry("optimizer", key="optimizer.name")


class Optimizer(NamedTuple):
    init: Any  # params -> opt_state
    update: Any  # (grads, opt_state, params, learning_rate, weight_decay) -> (params, opt_state)


def build_optimizer(config, specs) -> Optimizer:
    """specs: nested dict of ParamSpec that mirrors the parameters. Decay is decoupled: p -= lr * (u + wd * p)."""
    transform = OPTIMIZERS[config.optimizer.name](config, specs)
    lr_scale, wd_scale = group_multipliers(config.optimizer.groups, specs)
    scaling, name = build_parametrization(config.model), config.optimizer.name
    rates = of_parameters(lambda spec: scaling.learning_rate(spec, name), specs)
    lr_scale = jax.tree.map(lambda scale, rate: scale * rate, lr_scale, rates)
    wd_scale = jax.tree.map(lambda scale, rate: scale / rate, wd_scale, rates)  # lr * wd stays

    def update(grads, opt_state, params, learning_rate, weight_decay):
        updates, opt_state = transform.update(grads, opt_state, params)

        def apply(p, u, lr, wd):
            return (p - learning_rate * lr * (u + weight_decay * wd * p)).astype(p.dtype)

        return jax.tree.map(apply, params, updates, lr_scale, wd_scale), opt_state

    return Optimizer(transform.init, update)


def group_multipliers(groups, specs):
    """-> two trees of floats like specs. Raises UserError unless every parameter matches exactly one group's regex."""
    problems = []
    for group in groups:
        try:
            re.compile(group[0])
            ok = len(group) == 3
        except (re.error, TypeError, IndexError):
            ok = False
        if not ok:
            problems.append(f"optimizer.groups: {group!r} is not (regex, learning-rate multiplier, decay multiplier)")
    if problems:
        raise UserError(*problems)

    def match(path, spec):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        hits = [g for g in groups if re.fullmatch(g[0], name)]
        if len(hits) != 1:
            problems.append(f"optimizer.groups: parameter {name} matches {len(hits)} groups; it must match exactly one")
        return tuple(hits[0][1:]) if hits else (1.0, 1.0)

    is_spec = lambda x: isinstance(x, ParamSpec)
    pairs = jax.tree_util.tree_map_with_path(match, specs, is_leaf=is_spec)
    if problems:
        raise UserError(*problems)
    is_pair = lambda x: isinstance(x, tuple)
    return tuple(jax.tree.map(lambda pair, i=i: float(pair[i]), pairs, is_leaf=is_pair) for i in (0, 1))


def scale_by_adam(b1: float, b2: float, eps, dtype) -> optax.GradientTransformation:
    """Adam (arXiv:1412.6980) with both moments stored in `dtype` (optax offers that for the first only). eps: a number, or a tree
    of one for each parameter."""

    def init(params):
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        return {"count": jnp.zeros((), jnp.int32), "mu": zeros(), "nu": zeros()}

    def update(grads, state, params=None):
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # bfloat16 squares would lose the second moment
        count = state["count"] + 1
        mu = jax.tree.map(lambda m, g: b1 * m.astype(jnp.float32) + (1 - b1) * g, state["mu"], grads)
        nu = jax.tree.map(lambda v, g: b2 * v.astype(jnp.float32) + (1 - b2) * g * g, state["nu"], grads)
        c1, c2 = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)
        epsilons = eps if isinstance(eps, dict) else jax.tree.map(lambda m: eps, mu)
        updates = jax.tree.map(lambda m, v, e: (m / c1) / (jnp.sqrt(v / c2) + e), mu, nu, epsilons)
        store = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
        return updates, {"count": count, "mu": store(mu), "nu": store(nu)}

    return optax.GradientTransformation(init, update)


def per_layer(specs, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """For a transform with a norm of each parameter (a trust ratio, an RMS clip): each layer and expert of a stacked leaf is
    its own parameter. State is keyed by parameter path, by which it is sharded like its parameter."""
    with_paths, tree = jax.tree_util.tree_flatten_with_path(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_paths]
    depths = [spec.num_stacked for _, spec in with_paths]
    kinds = {kind: depth for depth, kind in enumerate(("others", "layers", "experts")) if depth in depths}

    def split(values):
        named = list(zip(names, tree.flatten_up_to(values), depths, strict=True))
        return {kind: {n: v for n, v, its_depth in named if its_depth == depth} for kind, depth in kinds.items()}

    def each(function, depth):
        return jax.vmap(each(function, depth - 1)) if depth else function

    def init(params):
        return {kind: each(transform.init, kinds[kind])(leaves) for kind, leaves in split(params).items()}

    def update(grads, state, params=None):
        grads, params, out, new_state = split(grads), split(params), {}, {}
        for kind, depth in kinds.items():
            updates, new_state[kind] = each(transform.update, depth)(grads[kind], state[kind], params[kind])
            out.update(updates)
        return tree.unflatten([out[n] for n in names]), new_state

    return optax.GradientTransformation(init, update)


@OPTIMIZERS.register("adamw")
def adamw(config, specs):
    o, scaling = config.optimizer, build_parametrization(config.model)
    eps = of_parameters(lambda spec: o.eps * scaling.epsilon(spec), specs)
    return scale_by_adam(o.b1, o.b2, eps, jnp.dtype(o.moment_dtype))


@OPTIMIZERS.register("muon")
def muon_with_adam(config, specs):
    o = config.optimizer
    adam = scale_by_adam(o.b1, o.b2, o.eps, jnp.dtype(o.moment_dtype))
    return muon(specs, adam, o.momentum, o.nesterov, o.muon_steps, o.adam_lr_ratio, jnp.dtype(o.moment_dtype))


@OPTIMIZERS.register("sgd")
def sgd(config, specs):
    o = config.optimizer
    return optax.trace(o.momentum, o.nesterov, jnp.dtype(o.moment_dtype))


@OPTIMIZERS.register("adafactor")
def adafactor(config, specs):
    return per_layer(specs, optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))


@OPTIMIZERS.register("lion")
def lion(config, specs):
    o = config.optimizer
    return optax.scale_by_lion(o.b1, o.b2, jnp.dtype(o.moment_dtype))


@OPTIMIZERS.register("lamb")
def lamb(config, specs):
    o = config.optimizer
    return per_layer(specs, optax.chain(optax.scale_by_adam(o.b1, o.b2, o.eps), optax.scale_by_trust_ratio()))


@OPTIMIZERS.register("rmsprop")
def rmsprop(config, specs):
    return optax.scale_by_rms(config.optimizer.b2, config.optimizer.eps)


@OPTIMIZERS.register("adan")
def adan(config, specs):
    """arXiv:2208.06677; b1, b2, b3 are one minus the paper's."""
    o = config.optimizer
    return optax.scale_by_adan(o.b1, o.b2, o.b3, o.eps)


@OPTIMIZERS.register("novograd")
def novograd(config, specs):
    """arXiv:1905.11286: the second moment is one number per layer of each parameter."""
    o = config.optimizer
    return per_layer(specs, optax.scale_by_novograd(o.b1, o.b2, o.eps))


def _register_adam_like(name, transform):
    @OPTIMIZERS.register(name)
    def build(config, specs):
        return transform(b1=config.optimizer.b1, b2=config.optimizer.b2, eps=config.optimizer.eps)


for _name, _transform in {"nadamw": lambda **kw: optax.scale_by_adam(**kw, nesterov=True),
                          "amsgrad": optax.scale_by_amsgrad, "adamax": optax.scale_by_adamax,
                          "adabelief": optax.scale_by_belief, "radam": optax.scale_by_radam,
                          "yogi": optax.scale_by_yogi}.items():
    _register_adam_like(_name, _transform)
