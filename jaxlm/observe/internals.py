"""Looking inside a step: for each layer the root mean square of gradients, of updates and of activations, the entropy of its
attention, the load of its experts.

The look is two programs of its own, run on a step's very inputs before that step: its state is what it would be without.

    norms        the run's own step, telling what its gradients and updates were in place of a new state
    activations  the forward pass, without dropout and without a mesh, of a few rows; attention by the plain kernel for a few
                 queries of each
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm.kernels.attention import BACKENDS, NO_EXTRAS, blockwise, plain_weights
from jaxlm.kernels.backend import Backend
from jaxlm.observe.jaxprs import REMATERIALISED, evaluate
from jaxlm.parallel import target
from jaxlm.parallel.compile import jit
from jaxlm.parallel.rules import replicated
from jaxlm.train.state import Model, build_model, flatten_paths, part_of

ROWS = 8  # of a batch, whose activations are looked at, and of each
QUERIES = 64  # whose attention is, evenly spaced
ENTROPY = "attention_entropy"


class Internals(NamedTuple):
    norms: Callable  # compiled
    activations: Callable

    def __call__(self, state, batch, hyper, *own) -> dict:
        """As `train_step` is called, nothing donated -> arrays on the device, for `internals_line`."""
        return {**self.norms(state, batch, hyper, *own), **self.activations(state["params"], batch)}


def build_internals(config, program) -> Internals:
    """Compiles both programs. config: that of `program`, as a ConfigDict."""
    looking = program.build_step(look=functools.partial(layer_norms, program.model))
    everywhere = replicated(program.mesh)
    with target.building_for(program.mesh.devices.flat[0]):
        model = watched_model(config, program.model)
        norms = jit(program.mesh, lambda *inputs: looking(*inputs)[1]["inside"], out_shardings=everywhere)
        state, batch = program.inputs[:2]
        rows = rows_looked_at(program.mesh, program.feed.shape[0])
        forward = jax.jit(lambda params, batch: activations(model, params, {k: a[:rows] for k, a in batch.items()}),
                          out_shardings=everywhere)
        return Internals(norms.lower(*program.inputs).compile(compiler_options=program.compiler_options),
                         forward.lower(state["params"], batch).compile(compiler_options=program.compiler_options))


def internals_line(step: int, found: dict) -> dict:
    """A line of metrics.jsonl: what is an array over layers becomes a number for each, "layers/3/attention/grad_rms"."""
    line = {"split": "internals", "step": step}
    for name, value in found.items():
        stack, _, rest = name.partition("/")
        line |= {f"{stack}/{i}/{rest}": float(v) for i, v in enumerate(value)} if np.ndim(value) else {name: float(value)}
    return dict(sorted(line.items(), key=lambda item: place_of(item[0])))


def place_of(name: str) -> list:
    """Sorts names of a line as a model is passed through; layer 2 before layer 10."""
    order = ("split", "step", "embedding", "encoder_layers", "first_layers", "layers")
    first = name.partition("/")[0]
    numbers = [int(part) if part.isdigit() else 0 for part in name.split("/")]
    return [order.index(first) if first in order else len(order), numbers, name]


# ---- Gradients and updates ---------------------------------------------------------------------------------------------------


def layer_norms(model: Model, grads, old, new, aux) -> dict:
    """{"layers/attention/grad_rms": (L,), "embedding/update_rms": (), ...}: over all numbers of a module's parameters. Gradients
    are means over target tokens, before clipping; updates are what the step added. The last of `aux`, of the experts."""
    updates = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), part_of(new["params"], model.trained),
                           part_of(old["params"], model.trained))
    found = {}
    for measure, tree in (("grad_rms", grads), ("update_rms", updates)):
        sums, sizes = {}, {}
        for (name, spec), leaf in zip(flatten_paths(model.trained).items(), jax.tree.leaves(tree), strict=True):
            module, axes = module_of(name), tuple(range(spec.stacked, leaf.ndim))
            sums[module] = sums.get(module, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
            sizes[module] = sizes.get(module, 0) + int(np.prod(leaf.shape[spec.stacked :]))
        found |= {f"{module}/{measure}": jnp.sqrt(sums[module] / sizes[module]) for module in sums}
    if "expert_counts" in aux:
        counts_LE = aux["expert_counts"].astype(jnp.float32)
        load_LE = counts_LE / jnp.maximum(jnp.mean(counts_LE, axis=-1, keepdims=True), 1)
        found |= {"layers/feedforward/router_load_max": jnp.max(load_LE, axis=-1),
                  "layers/feedforward/router_load_min": jnp.min(load_LE, axis=-1)}
    return found


def module_of(name: str) -> str:
    """layers/attention/query/kernel -> layers/attention; a layer's norms are one module; embedding stays embedding."""
    first, *rest = name.split("/")
    if not first.endswith("layers"):
        return first
    return f"{first}/norms" if "norm" in rest[0] else f"{first}/{rest[0]}"


# ---- Activations and attention -----------------------------------------------------------------------------------------------


def rows_looked_at(mesh, rows: int) -> int:
    """Of a batch of so many: some of each device that has any."""
    with_rows = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
    return min(rows, with_rows * -(-ROWS // with_rows))


def watched_model(config, model: Model):
    """-> the graph of the same model whose blocks and attention can be looked at: each one `jax.checkpoint`, none in a loop."""
    watched = config.copy_and_resolve_references()
    watched.model.remat, watched.model.scan_layers = "full", False
    return build_model(watched, model.specs["embedding"].shape[0], "watched").graph


def queries_of(T: int):
    return np.unique(np.linspace(0, T - 1, min(T, QUERIES)).round().astype(np.int32))


def watched(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras=NO_EXTRAS):
    """The attention of `blockwise`, and beside it the entropy of some queries' weights under a name. A sink is one more thing to
    look at."""
    out_BTNH = blockwise(q_BTNH, k_BSKH, v_BSKH, window, softcap, segment_ids_BT, first_query, extras)
    at_Q, ids_BQ = queries_of(q_BTNH.shape[1]), None
    if extras.bias_NTS is not None:
        extras = extras._replace(bias_NTS=extras.bias_NTS[:, at_Q])
    if segment_ids_BT is not None:
        ids_BQ = segment_ids_BT[:, at_Q]
        if extras.key_segment_ids_BS is None:
            extras = extras._replace(key_segment_ids_BS=segment_ids_BT)
    first_Q1 = (first_query + at_Q - np.arange(len(at_Q)))[:, None]  # so that query i is the one of position at_Q[i]
    weights = plain_weights(q_BTNH[:, at_Q], k_BSKH, window, softcap, ids_BQ, first_Q1, extras)
    entropy_BKGQ = jnp.sum(surprise(weights), axis=-1)
    if extras.sinks_N is not None:
        entropy_BKGQ += surprise(jnp.maximum(1 - jnp.sum(weights, axis=-1), 0))
    entropy_BNQ = entropy_BKGQ.reshape(len(entropy_BKGQ), -1, len(at_Q))
    # Its value is not used: only its name brings it out.
    return out_BTNH + 0 * jnp.sum(checkpoint_name(entropy_BNQ, ENTROPY)).astype(out_BTNH.dtype)


def surprise(p):
    return -p * jnp.log(jnp.maximum(p, 1e-30))


BACKENDS.register("watched")(Backend(lambda request: "is what observe.internals_every looks at attention with", watched))


def activations(graph, params, batch) -> dict:
    """{"layers/0/activation_rms": ...} of each block's output (the residual stream), of what its attention and its feed-forward
    add to it before any norm that follows, and the entropy of its attention, over tokens that are not padding."""
    def forward(params):
        model, memory = nnx.merge(graph, params), None
        if model.cross:
            memory = model.encode(batch["source_tokens"], batch["source_positions"], batch["source_segment_ids"])
        return model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"], memory=memory,
                            prefix_BS=model.given(batch))[0]

    shape = nnx.merge(graph, params)  # of the layers
    stacks = ({"encoder_layers": len(jax.tree.leaves(params["encoder_layers"])[0])} if shape.cross else {}) | shape.stacks
    names = [f"{stack}/{i}" for stack, length in stacks.items() for i in range(length)]
    closed, seen = jax.make_jaxpr(forward)(params), []
    last_BTD, = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(params), seen)
    found, within, layer = {}, [], 0
    for name, value in seen:
        if name != REMATERIALISED:
            within.append((name, value))
            continue
        live_BT = batch["source_segment_ids" if names[layer].startswith("encoder") else "segment_ids"] > 0
        found |= of_block(names[layer], value, within, live_BT, routed=hasattr(shape.layers.feedforward, "router"))
        within, layer = [], layer + 1
    assert layer == len(names), f"{layer} blocks were seen, there are {len(names)}"
    return {**found, "final_norm/activation_rms": rms(last_BTD, batch["segment_ids"] > 0)}


def of_block(path: str, x_BTD, within: list, live_BT, routed: bool) -> dict:
    """within: (name, value) of the named tensors of this block, in order."""
    found = {f"{path}/activation_rms": rms(x_BTD, live_BT)}
    routed = routed and path.startswith("layers")
    for name, value in within:
        if name == "attention_out":
            found[f"{path}/attention/activation_rms"] = rms(value, live_BT)
        elif name == "down":  # beside routed experts, the shared one alone has the name
            found[f"{path}/{'shared_expert' if routed else 'feedforward'}/activation_rms"] = rms(value, live_BT)
        elif name == ENTROPY:
            module = "cross" if f"{path}/attention/{ENTROPY}" in found else "attention"
            live_B1Q = live_BT[:, None, queries_of(live_BT.shape[1])]
            of_heads = jnp.sum(value * live_B1Q, axis=(0, 2)) / jnp.maximum(jnp.sum(live_B1Q), 1)
            found |= {f"{path}/{module}/{ENTROPY}": jnp.mean(of_heads), f"{path}/{module}/{ENTROPY}_min": jnp.min(of_heads)}
    return found


def rms(x, live_BT):
    squares_BT = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=tuple(range(2, x.ndim)))
    return jnp.sqrt(jnp.sum(jnp.where(live_BT, squares_BT, 0)) / jnp.maximum(jnp.sum(live_BT), 1))
