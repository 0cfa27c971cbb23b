"""Dropless dispatch: rows to the experts they chose and back, on one device or over the mesh axis `expert`.

Over devices, rows go to their experts and back by all-to-all (Lepikhin et al., arXiv:2006.16668), and none is dropped. Shapes
are static, so each device keeps buffers for the worst case: the tokens of all devices along `expert`, times the smaller of
experts_per_token and the experts of a device. As long as no device is sent more than `SLACK` times its equal share by another,
buffers of that size do as well; which of the two is used is decided anew each time, and changes the traffic, never the numbers.
XLA takes memory for the worst case either way.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.parallel.rules import mesh_size, on_a_mesh, spec_of_axes

AXIS = "expert"
SLACK = 2.0
KERNEL_AXES = {"up": ("expert", "embed", "mlp"), "gate": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed"),
               "up_lora_a": ("expert", "embed", None), "up_lora_b": ("expert", None, "mlp"),
               "gate_lora_a": ("expert", "embed", None), "gate_lora_b": ("expert", None, "mlp"),
               "down_lora_a": ("expert", "mlp", None), "down_lora_b": ("expert", None, "embed"),
               "up_bias": ("expert", "mlp"), "gate_bias": ("expert", "mlp"), "down_bias": ("expert", None)}


def dispatch(run, x_BTD, choices_BTK, weights_BTK, kernels: dict):
    """sum over k of weights_BTK times expert choices_BTK of x_BTD -> y_BTD.

    run: (rows_XD, sizes_E, kernels) -> rows_XD: rows in the order of their experts through those experts, kernels by `gather`.
    choices_BTK: expert of each choice; the number of experts (one too many) where a token goes to none and zeros come back.
    kernels: {"up": (E, D, F), "down": (E, F, D)[, "gate": (E, D, F)]}, and biases "up_bias": (E, F), ... and adapters
        "up_lora_a": (E, D, R), "up_lora_b": (E, R, F), ... where there are any.
    """
    if not on_a_mesh():
        return combine(through_own(run, x_BTD, choices_BTK, kernels), weights_BTK).astype(x_BTD.dtype)

    def island(x, choices, weights, kernels):
        through = through_own if mesh_size(AXIS) == 1 else through_others
        y = combine(through(run, x, choices, kernels), weights).astype(x.dtype)
        return jax.lax.psum(y, "tensor") if mesh_size("tensor") > 1 else y  # each device had its share of the hidden layer

    tokens = spec_of_axes(("batch", "seq", None))
    specs = {name: spec_of_axes(KERNEL_AXES[name]) for name in kernels}
    return jax.shard_map(island, in_specs=(tokens, tokens, tokens, specs), out_specs=tokens, check_vma=False)(
        x_BTD, choices_BTK, weights_BTK, kernels)


def choose(preferred_BTE, count: int, limit=None):
    """-> choices_BTK, the `count` experts with the highest numbers; of equals, the lower one. XLA's partitioner would gather the
    whole batch for it. limit: applied to the numbers first, token by token."""
    top, tokens = lambda a: jax.lax.top_k(limit(a) if limit else a, count)[1], spec_of_axes(("batch", "seq", None))
    if on_a_mesh():
        top = jax.shard_map(top, in_specs=tokens, out_specs=tokens, check_vma=False)
    return top(preferred_BTE)


def best_groups(preferred_BTE, groups: int, kept: int, best: int):
    """Node-limited routing (DeepSeek-V2, arXiv:2405.04434, 2.2.2): -inf but for the experts of those `kept` of `groups` equal
    groups whose `best` highest numbers have the largest sum."""
    grouped_BTGE = preferred_BTE.reshape(*preferred_BTE.shape[:-1], groups, -1)
    score_BTG = jnp.sum(jax.lax.top_k(grouped_BTGE, best)[0], axis=-1)
    chosen_BTG = jnp.any(jax.lax.top_k(score_BTG, kept)[1][..., None] == jnp.arange(groups), axis=-2)
    return jnp.where(chosen_BTG[..., None], grouped_BTGE, -jnp.inf).reshape(preferred_BTE.shape)


def gather(name: str, kernel):
    """A kernel whole in `embed`, where `run` needs it. To be undone by a checkpoint: FSDP keeps no gathered kernels."""
    if mesh_size("fsdp") == 1 or "embed" not in KERNEL_AXES[name]:
        return kernel
    return jax.lax.all_gather(kernel, "fsdp", axis=KERNEL_AXES[name].index("embed"), tiled=True)


@jax.checkpoint  # nothing is kept in float32
def combine(out_BTKD, weights_BTK):
    """-> y_BTD float32. A sum, not a product: a matrix unit would round the weights."""
    return jnp.sum(weights_BTK[..., None] * out_BTKD, axis=2)


def through_own(run, x_BTD, choices_BTK, kernels):
    """All experts are here -> out_BTKD."""
    rows_XD = jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), choices_BTK.shape[-1], axis=0)
    return through_experts(run, rows_XD, choices_BTK.reshape(-1), kernels).reshape(*choices_BTK.shape, -1)


def through_others(run, x_BTD, choices_BTK, kernels):
    """Each device of the axis has its share of the experts -> out_BTKD."""
    count, own = mesh_size(AXIS), len(kernels["up"])
    K = choices_BTK.shape[-1]
    tokens = math.prod(choices_BTK.shape[:-1])
    rows_XD, keys_X = jnp.repeat(x_BTD.reshape(-1, x_BTD.shape[-1]), K, axis=0), choices_BTK.reshape(-1)
    order_X = jnp.argsort(keys_X, stable=True)
    rows_XD, keys_X = permute(rows_XD, order_X, jnp.argsort(order_X)), keys_X[order_X]
    starts = jnp.searchsorted(keys_X, jnp.arange(count + 1) * own)  # where the rows for each device begin
    worst = tokens * min(K, own)
    usual = min(worst, math.ceil(SLACK * tokens * K / count))
    send = partial(exchange, run)
    if usual == worst or mesh_size("stage") > 1:  # under the pipeline's vmap both branches of a `cond` would be computed
        out_XD = send(worst, rows_XD, keys_X, starts, kernels)
    else:
        fullest = jax.lax.pmax(jnp.max(jnp.diff(starts)), ("data", "fsdp", "context", AXIS))  # all devices take the same branch
        # What the rare branch would keep for its gradient is computed again: else both branches would keep theirs.
        out_XD = jax.lax.cond(fullest <= usual, partial(send, usual), jax.checkpoint(partial(send, worst)),
                              rows_XD, keys_X, starts, kernels)
    return permute(out_XD, jnp.argsort(order_X), order_X).reshape(*choices_BTK.shape, -1)


def exchange(run, capacity: int, rows_XD, keys_X, starts, kernels):
    """Sorted rows to the devices of their experts, through them, and back: out_XD. `capacity`: places for each other device."""
    own = len(kernels["up"])
    count = len(starts) - 1
    place = starts[:-1, None] + jnp.arange(capacity)
    filled = place < starts[1:, None]
    place = jnp.where(filled, place, len(keys_X))
    sent = rows_XD.at[place].get(mode="fill", fill_value=0)
    sent_keys = jnp.where(filled, keys_X.at[place].get(mode="clip") - jnp.arange(count)[:, None] * own, own)
    swap = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True)
    received, received_keys = swap(sent), swap(sent_keys)
    out = through_experts(run, received.reshape(-1, received.shape[-1]), received_keys.reshape(-1), kernels)
    out = swap(out.reshape(received.shape)).reshape(-1, received.shape[-1])
    to = jnp.minimum(keys_X // own, count - 1)
    back = to * capacity + jnp.arange(len(keys_X)) - starts[to]
    return out.at[jnp.where(keys_X < count * own, back, len(out))].get(mode="fill", fill_value=0)


def through_experts(run, rows_XD, keys_X, kernels):
    """Each row through the expert keys_X of `kernels`; zeros where there is no such expert."""
    order_X = jnp.argsort(keys_X, stable=True)
    back_X = jnp.argsort(order_X)
    sizes_E = jnp.diff(jnp.searchsorted(keys_X[order_X], jnp.arange(len(kernels["up"]) + 1)))
    return permute(run(permute(rows_XD, order_X, back_X), sizes_E, kernels), back_X, order_X)


@jax.custom_vjp
def permute(rows_XD, order_X, inverse_X):
    """rows_XD[order_X]; its gradient is a look-up too, not a scatter."""
    return rows_XD[order_X]


permute.defvjp(lambda rows, order, inverse: (rows[order], inverse), lambda inverse, d_rows: (d_rows[inverse], None, None))
