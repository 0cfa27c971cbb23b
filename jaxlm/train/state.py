"""The train state: a plain nested dict {step, params, opt_state[, ema]}, born under jit on its devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models.parameter import ParamSpec, spec_of
from jaxlm.models.transformer import FAMILIES
from jaxlm.parallel.mesh import replicated, sharding_of


class Model(NamedTuple):
    """A model without its numbers: `nnx.merge(graph, params)` inside jit gives the callable module."""

    graph: nnx.GraphDef
    specs: dict  # nested dict of ParamSpec, mirrors params
    init: object  # key -> params

    @property
    def num_parameters(self) -> int:
        return sum(size_of(s) for s in spec_leaves(self.specs))

    @property
    def num_matmul_parameters(self) -> int:
        """P of the FLOP count: parameters in matrix products, the head included, the embedding look-up not."""
        specs = flatten_paths(self.specs)
        total = sum(size_of(s) for s in specs.values() if s.num_inputs)
        return total if "head/kernel" in specs else total + size_of(specs["embedding"])


def build_model(config, vocab_size: int, attention_backend: str) -> Model:
    def make(key):
        return FAMILIES[config.model.family](config, vocab_size, attention_backend, nnx.Rngs(params=key))

    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    specs = nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(spec_of(v)), abstract, is_leaf=is_variable))
    return Model(graph, specs, lambda key: nnx.to_pure_dict(nnx.state(make(key), nnx.Param)))


def is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def spec_leaves(specs) -> list[ParamSpec]:
    return jax.tree.leaves(specs, is_leaf=is_spec)


def size_of(spec: ParamSpec) -> int:
    size = 1
    for n in spec.shape:
        size *= n
    return size


def flatten_paths(tree) -> dict:
    """{"layers/attention/query/kernel": leaf, ...} of a nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def build_init(config, model: Model, optimizer):
    """-> `init(seed) -> state`, not yet jitted."""

    def init(seed):
        params = model.init(jax.random.key(seed))
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}
        if config.optimizer.ema_decay:
            state["ema"] = params
        return state

    return init


def state_shardings(mesh, model: Model, abstract_state):
    """A sharding per leaf: parameters by their axes, and every other leaf shaped like one of them (moments) the same
    way; the rest (counters, factored moments) replicated."""
    by_path = {path: (spec.shape, sharding_of(mesh, spec.axes, spec.shape))
               for path, spec in flatten_paths(model.specs).items()}

    def shard(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for known, (shape, sharding) in by_path.items():
            if name.endswith("/" + known) and leaf.shape == shape:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(shard, abstract_state)
