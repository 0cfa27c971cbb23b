"""The train state: a plain nested dict {step, params, opt_state[, ema]}, born under jit on its devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.models import encoder, encoder_decoder  # noqa: F401  register themselves
from jaxlm.models.parameter import ParamSpec, spec_of
from jaxlm.models.transformer import FAMILIES
from jaxlm.parallel.rules import constrain, fit, rules_of_parameters, sharding_of, spec_of_axes


class Model(NamedTuple):
    """A model without its numbers: `nnx.merge(graph, params)` inside jit gives the callable module."""

    graph: nnx.GraphDef
    specs: dict  # nested dict of ParamSpec, mirrors params
    init: object  # key -> params

    @property
    def num_parameters(self) -> int:
        return sum(size_of(s) for s in spec_leaves(self.specs))

    @property
    def num_active_parameters(self) -> int:
        """Those that one token uses: fewer than all only in a mixture of experts."""
        return sum(active_size_of(s) for s in spec_leaves(self.specs))

    @property
    def num_matmul_parameters(self) -> int:
        """P of the FLOP count: parameters of a token's matrix products, the head included, the embedding look-up not; of a
        mixture of experts, those of the experts that a token is sent to."""
        specs = flatten_paths(self.specs)
        total = sum(active_size_of(s) for s in specs.values() if s.num_inputs)
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


def active_size_of(spec: ParamSpec) -> int:
    return round(size_of(spec) * spec.share)


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


def parameter_shardings(mesh, model: Model, zero_stage: int):
    rules = rules_of_parameters(zero_stage)
    return jax.tree.map(lambda s: sharding_of(mesh, s.axes, s.shape, rules), model.specs, is_leaf=is_spec)


def state_shardings(mesh, model: Model, abstract_state, zero_stage: int = 3):
    """A sharding per leaf, see `spec_of_leaf`."""
    specs = flatten_paths(model.specs)

    def shard(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec_of_leaf(mesh, specs, name, leaf.shape, zero_stage))

    return jax.tree_util.tree_map_with_path(shard, abstract_state)


def spec_of_leaf(mesh, specs: dict, name: str, shape: tuple, zero_stage: int) -> PartitionSpec:
    """How a leaf of the state lies: parameters by their axes, and every other leaf shaped like one of them (moments, averages)
    too, cut up over fsdp also where ZeRO-1 repeats the parameters; the rest (counters, factored moments) replicated.

    mesh: whatever has the sizes of its axes as `.shape`. specs: {path: ParamSpec}; name: "params/embedding", ...
    """
    rules = rules_of_parameters(zero_stage if name.startswith("params/") else 3)
    for known, spec in specs.items():
        if name.endswith("/" + known) and shape == spec.shape:
            return fit(spec_of_axes(spec.axes, rules), shape, mesh)
    return PartitionSpec()


def lay_out(model: Model, tree):
    """A tree like the parameters, on the ambient mesh as the optimizer state lies: for gradients, this makes of their sum over
    devices a reduce-scatter."""
    return jax.tree.map(lambda spec, x: constrain(x, *spec.axes), model.specs, tree, is_leaf=is_spec)
