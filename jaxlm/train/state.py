"""The train state: a plain nested dict {step, params, opt_state[, ema]}, born under jit on its devices."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import UserError
from jaxlm.models import encoder, encoder_decoder  # noqa: F401  register themselves
from jaxlm.models.dense import ADAPTED
from jaxlm.models.parameter import ParamSpec, spec_of
from jaxlm.models.transformer import FAMILIES
from jaxlm.parallel.rules import constrain, fit, rules_of_parameters, sharding_of, spec_of_axes


class Model(NamedTuple):
    """A model without its numbers: `nnx.merge(graph, params)` inside jit gives the callable module."""

    graph: nnx.GraphDef
    specs: dict  # nested dict of ParamSpec, mirrors params
    trained: dict  # the part of specs that is not frozen
    init: object  # key -> params

    @property
    def num_parameters(self) -> int:
        return sum(size_of(s) for s in spec_leaves(self.specs))

    @property
    def num_trained(self) -> int:
        return sum(size_of(s) for s in spec_leaves(self.trained))

    @property
    def num_active_parameters(self) -> int:
        """Those that one token uses: fewer than all only in a mixture of experts."""
        return sum(active_size_of(s) for s in spec_leaves(self.specs))

    @property
    def num_matmul_parameters(self) -> int:
        """P of the FLOP count: parameters of a token's matrix products, the head included, the embedding look-up not; of a
        mixture of experts, those of the experts that a token is sent to."""
        return matmul_parameters(self.specs)

    @property
    def num_trained_matmul_parameters(self) -> int:
        """Of these, those whose gradient is made."""
        return matmul_parameters(self.trained)


def build_model(config, vocab_size: int, attention_backend: str) -> Model:
    def make(key):
        return FAMILIES[config.model.family](config, vocab_size, attention_backend, nnx.Rngs(params=key))

    graph, abstract = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    specs = nnx.to_pure_dict(jax.tree.map(lambda v: v.replace(spec_of(v)), abstract, is_leaf=is_variable))
    return Model(graph, specs, trained_part(config, specs), lambda key: nnx.to_pure_dict(nnx.state(make(key), nnx.Param)))


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


def matmul_parameters(specs) -> int:
    specs = flatten_paths(specs)
    total = sum(active_size_of(s) for s in specs.values() if s.num_inputs)
    told = not any(name in specs for name in ("head/kernel", "classifier/kernel")) and "embedding" in specs
    return total + size_of(specs["embedding"]) if told else total


ADAPTER = r".*/lora_[ab]"  # path of an adapter's parameter


def trained_part(config, specs: dict) -> dict:
    """The specs of those parameters that train: not those of `optimizer.freeze`, and the adapters alone where there are any.

    Raises UserError: the regex is none, or names no parameter, or all; or the adapters are of modules that the model has not.
    """
    names, freeze = list(flatten_paths(specs)), config.optimizer.freeze
    adapters = {name for name in names if re.fullmatch(ADAPTER, name)}
    if config.model.lora_rank and not adapters:
        raise UserError(f"model.lora_modules={config.model.lora_modules!r} matches no module of this model; those it can have "
                        f"are {', '.join(ADAPTED)}")
    try:
        frozen = {name for name in names if re.fullmatch(freeze, name)} | (set(names) - adapters if adapters else set())
    except re.error as error:
        raise UserError(f"optimizer.freeze={freeze!r} is no regex: {error}") from error
    if freeze and not any(re.fullmatch(freeze, name) for name in names):
        raise UserError(f"optimizer.freeze={freeze!r} matches no parameter; there are {', '.join(names[:8])}, ...")
    if len(frozen) == len(names):
        raise UserError(f"optimizer.freeze={freeze!r} freezes every parameter; leave some to train")
    return without(specs, frozen)


def without(tree: dict, names: set[str], prefix: str = "") -> dict:
    """A nested dict less the leaves of these paths."""
    pairs = ((k, without(v, names, f"{prefix}{k}/") if isinstance(v, dict) else v) for k, v in tree.items()
             if f"{prefix}{k}" not in names)
    return {k: v for k, v in pairs if not (isinstance(v, dict) and not v)}


def part_of(tree: dict, like: dict) -> dict:
    """What `tree` has where the nested dict `like` has something."""
    return {k: part_of(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}


def with_part(tree: dict, part: dict) -> dict:
    """`tree` with what `part` has in place of its own."""
    return {k: v if k not in part else with_part(v, part[k]) if isinstance(v, dict) else part[k] for k, v in tree.items()}


def flatten_paths(tree) -> dict:
    """{"layers/attention/query/kernel": leaf, ...} of a nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def build_init(config, model: Model, optimizer):
    """-> `init(seed) -> state`, not yet jitted."""

    def init(seed):
        params = model.init(jax.random.key(seed))
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(part_of(params, model.trained))}
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
    """A tree like the parameters that train, on the ambient mesh as the optimizer state lies: for gradients, this makes of their
    sum over devices a reduce-scatter."""
    return jax.tree.map(lambda spec, x: constrain(x, *spec.axes), model.trained, tree, is_leaf=is_spec)
