"""What a step will hold, compute and send, from sizes alone, in milliseconds: for a search over hundreds of layouts, and where no
compiler for the hardware is at hand. `jaxlm.plan.compiled` asks the compiler; tests/test_plan.py holds the two together.

All is per device unless it says otherwise. The model is of an accelerator with a fused attention kernel, memory linear in T.
"""

import math
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.kernels.cross_entropy import chunk_tokens
from jaxlm.models.remat import DOTS, KERNEL, POLICIES
from jaxlm.objectives.build import build_objective
from jaxlm.observe.throughput import attention_width, flops_per_token, reach
from jaxlm.optimizers.build import build_optimizer
from jaxlm.parallel.mesh import AXES, SLOW
from jaxlm.parallel.rules import BATCH
from jaxlm.plan.hardware import Chip, bandwidth
from jaxlm.train.frozen import build_frozen
from jaxlm.train.state import build_init, build_model, flatten_paths, spec_of_leaf

STATE = ("parameters", "optimizer", "average")  # parts of the memory
FROZEN = "frozen model"  # another: of a teacher or a reference, its own parameters


class Sizes(NamedTuple):
    """Of a model and its state, whatever the layout."""

    model: object  # jaxlm.train.state.Model
    specs: dict  # {path: ParamSpec}
    leaves: dict  # of the state: {path: (shape, bytes of a number)}
    vocab_size: int
    frozen: object = None  # jaxlm.train.frozen.Frozen, where the objective looks at a second model


def sizes_of(config, vocab_size: int) -> Sizes:
    model = build_model(config, vocab_size, "plain")
    state = jax.eval_shape(build_init(config, model, build_optimizer(config, model.trained)), 0)
    leaves = {path: (a.shape, a.dtype.itemsize) for path, a in flatten_paths(state).items()}
    return Sizes(model, flatten_paths(model.specs), leaves, vocab_size, build_frozen(config, build_objective(config), model))


class Estimate(NamedTuple):
    memory: dict[str, float]  # bytes by part, at the moment when most is held
    flops: float  # of one device, what rematerialisation does again included
    model_flops: float  # of one device, causal attention, without that
    bytes: float  # read from and written to memory
    product_bytes: float  # of these, by matrix products
    network: dict[str, float]  # {"all-gather fsdp": bytes sent, ...}
    network_seconds: float
    host_bytes: float  # sent to the host's memory and back

    @property
    def peak(self) -> float:
        return sum(self.memory.values())


def estimate(config, sizes: Sizes, axes: dict[str, int], chip: Chip | None, slices: int = 1) -> Estimate:
    """axes: {"data": 4, ...}. chip: None where the network's speed is not known (its seconds are 0 then)."""
    d = Dimensions(config, axes, sizes.vocab_size)
    memory = state_memory(config, sizes, axes) | frozen_memory(config, sizes, axes)
    memory |= step_memory(config, d, sizes, axes, chip)
    network = traffic(config, d, sizes, axes)
    devices = math.prod(axes.values())
    seconds = network_seconds(config, network, axes, chip, slices) if chip else 0.0
    flops, model_flops = work(config, sizes)
    product_bytes, other_bytes = moved(config, d, sizes, axes, memory)
    return Estimate(memory, flops / devices, model_flops / devices, product_bytes + other_bytes, product_bytes, network, seconds,
                    offloaded(config, d))


class Dimensions:
    """Sizes on one device: rows, tokens, and what a token takes in a layer. Letters as in `jaxlm.models`."""

    def __init__(self, config, axes, vocab_size: int):
        m = config.model
        rows = config.batch_size / config.grad_accum_steps / math.prod(axes[a] for a in BATCH)
        self.tensor, self.stages, self.fsdp, self.context = axes["tensor"], axes["stage"], axes["fsdp"], axes["context"]
        self.rows, self.T = rows, config.seq_len / self.context
        self.tokens = rows * self.T  # of a micro-batch
        self.accum, self.layers = config.grad_accum_steps, m.num_layers / self.stages
        self.D, self.V = m.embed_dim, vocab_size / self.tensor
        self.q, self.kv = m.num_heads * m.head_dim / self.tensor, m.num_kv_heads * m.head_dim / self.tensor
        gated = m.expert_form if m.feedforward == "moe" else m.feedforward
        self.ups = 2 if gated in ("swiglu", "geglu", "clamped_swiglu") else 1
        self.moe = m.feedforward == "moe"
        copies = m.experts_per_token + m.shared_experts if self.moe else 1  # of a token, each through a feed-forward
        self.F = copies * m.mlp_dim / self.tensor
        self.compute = np.dtype("float32").itemsize if m.compute_dtype == "float32" else 2
        self.fused = config.kernels.fused_projections == "always" or (
            config.kernels.fused_projections == "auto" and self.tensor > 1)

    def widths(self) -> dict[str, float]:
        """Numbers a token has in each named tensor of a layer (`jaxlm.models.remat.NAMES`)."""
        residual = self.D / self.tensor
        inner = {} if self.moe else {"gate": self.F if self.ups == 2 else 0, "up": self.F, "down": residual}
        return {"query": self.q, "key": self.kv, "value": self.kv, KERNEL: self.q, "attention_out": residual, **inner}


def kept(remat: str) -> tuple[list[str], list[str]]:
    """-> (tensors kept on the device, tensors kept in the host's memory); of "none" all."""
    if remat == "none":
        return [*DOTS, KERNEL], []
    parts = [part for part in POLICIES.get(remat, remat).split(",") if part]
    host = [part.removeprefix("offload:") for part in parts if part.startswith("offload:")]
    return [part for part in parts if not part.startswith("offload:")], host


# ---- Memory -----------------------------------------------------------------------------------------------------------------


def state_memory(config, sizes: Sizes, axes) -> dict[str, float]:
    mesh, totals = SimpleNamespace(shape=axes), dict.fromkeys(STATE, 0.0)
    for path, (shape, itemsize) in sizes.leaves.items():
        spec = spec_of_leaf(mesh, sizes.specs, path, shape, config.mesh.zero_stage)
        part = {"params": "parameters", "ema": "average"}.get(path.partition("/")[0], "optimizer")
        totals[part] += math.prod(shape) / cuts(spec, axes) * itemsize
    return {part: size for part, size in totals.items() if size}


def frozen_memory(config, sizes: Sizes, axes) -> dict[str, float]:
    if sizes.frozen is None:
        return {}
    mesh, specs = SimpleNamespace(shape=axes), flatten_paths(sizes.frozen.model.specs)
    return {FROZEN: sum(math.prod(s.shape) * s.dtype.itemsize / cuts(
        spec_of_leaf(mesh, specs, "params/" + path, s.shape, config.mesh.zero_stage), axes) for path, s in specs.items())}


def cuts(spec, axes) -> int:
    """Parts that a PartitionSpec cuts an array into."""
    return math.prod(axes[name] for names in spec if names for name in np.atleast_1d(names))


def shard_size(sizes: Sizes, axes, only=lambda path: True, whole=False) -> float:
    """Parameters on one device, as gradients lie, cut up over fsdp too; whole: gathered over fsdp."""
    mesh, total = SimpleNamespace(shape={**axes, "fsdp": 1} if whole else axes), 0.0
    for path, spec in sizes.specs.items():
        if only(path):
            total += math.prod(spec.shape) / cuts(spec_of_leaf(mesh, sizes.specs, "opt/" + path, spec.shape, 3), mesh.shape)
    return total


def in_layers(path: str) -> bool:
    return path.startswith(("layers/", "first_layers/", "encoder_layers/"))


def step_memory(config, d: Dimensions, sizes: Sizes, axes, chip) -> dict[str, float]:
    """What a step adds to the state, at the worse of two moments: in the loss, when all layers' activations are kept and the
    logits are there; in the backward pass of a layer, with the gradients of those behind it."""
    m, c = config.model, d.compute
    widths = d.widths()
    on_device, _ = kept(m.remat)
    # A TPU keeps a kernel's result with heads filled up to its 128 lanes.
    widths[KERNEL] *= max(1, 128 / m.head_dim) if chip and chip.torus and m.remat != "none" else 1
    per_token = d.D / d.tensor + sum(widths.get(name, 0) for name in on_device)
    if m.remat == "none":
        per_token += 2 * d.D + d.D / d.tensor + d.F  # norms' results, the residual between, the activation
    saved = d.layers * d.tokens * per_token * c
    if KERNEL in on_device:
        saved += d.layers * d.tokens * m.num_heads / d.tensor * 4  # log-sum-exp
    if d.stages > 1:  # a circular pipeline keeps each micro-batch's inputs; bubbles are garbage that is kept too
        saved *= 1 + 1 / 2

    if m.param_dtype != m.compute_dtype:  # XLA casts all layers' parameters before it goes over them
        saved += c * shard_size(sizes, axes, in_layers, whole=config.mesh.zero_stage == 1)
    trained = flatten_paths(sizes.model.trained)
    gradients = shard_size(sizes, axes, trained.__contains__) * 4 * (2 if d.accum > 1 else 1)
    layer = shard_size(sizes, axes, in_layers, whole=True) / d.layers * c
    working = d.tokens * c * (5 * d.F + 2 * d.D + 2 * d.q + 2 * d.kv) + 3 * layer
    if d.fused:
        working += d.tokens * c * 2 * d.ups * d.F
    if d.context > 1:  # `jaxlm.parallel.context` has no fused kernel: the scores of two chunks, and half as much beside
        working += 1.5 * 4 * d.rows * m.num_heads / d.tensor * (d.T / 2) ** 2
    head = d.D * d.V
    slice_tokens = min(d.tokens, chunk_tokens(d.rows, d.T, d.V, config.kernels.loss))
    logits = slice_tokens * d.V * (4 + c) + 2 * head * c
    table = 2 * head * d.tensor * 4 * ("embedding" in trained)  # the embedding's gradient, whole, and its sum over devices
    in_loss, in_layer, at_end = saved + logits, saved + gradients + working, gradients + table
    worst = max(in_loss, in_layer, at_end)
    if worst == in_loss:
        return {"activations": saved, "logits": logits}
    if worst == in_layer:
        return {"activations": saved, "gradients": gradients, "temporaries": working}
    return {"gradients": gradients, "temporaries": table}


def offloaded(config, d: Dimensions) -> float:
    """Bytes that go to the host's memory in the forward pass, and come back in the backward pass."""
    widths = d.widths()
    return 2 * d.layers * d.accum * d.tokens * sum(widths.get(name, 0) for name in kept(config.model.remat)[1]) * d.compute


# ---- Work -------------------------------------------------------------------------------------------------------------------


def attention_work(config, sizes: Sizes, whole_squares: bool = False) -> float:
    """FLOPs of attention's own products in a step, on all devices: two forward, again where they are done again, and in the
    backward pass of a fused kernel seven (FlashAttention-2 as splash does it: the scores once for dQ, once for dK and dV). Of a
    frozen model the two.

    whole_squares: for `plain`, which computes what the causal mask hides, and has four in the backward pass.
    """
    on_device, on_host = kept(config.model.remat)
    result_kept = config.model.remat == "none" or KERNEL in (*on_device, *on_host)
    again = 0 if config.model.remat == "none" else 2 if not result_kept else 1 if whole_squares else 0  # `plain` needs its scores
    products = 2 + again + (4 if whole_squares else 7)
    of_model = lambda config: 2 * attention_width(config.model) * reach(config)
    of_all = products * of_model(config) + (2 * of_model(sizes.frozen.config) if sizes.frozen else 0)
    return config.batch_size * config.seq_len * of_all * (1 if whole_squares else 0.5)


def work(config, sizes: Sizes, whole_squares: bool = False) -> tuple[float, float]:
    """-> FLOPs of a step on all devices (what is computed, what the model needs: causal attention, nothing twice)."""
    tokens = config.batch_size * config.seq_len
    matmul, trained = sizes.model.num_matmul_parameters, sizes.model.num_trained_matmul_parameters
    frozen = sizes.frozen.matmul_parameters if sizes.frozen else 0
    products = tokens * (4 * matmul + 2 * trained + 2 * products_again(config, sizes) + 2 * frozen)
    return (products + attention_work(config, sizes, whole_squares),
            tokens * flops_per_token(config, matmul, trained, sizes.frozen)[0])


def products_again(config, sizes: Sizes) -> float:
    """Parameters of a token's products that rematerialisation does a second time."""
    if config.model.remat == "none":
        return 0.0
    known = set().union(*kept(config.model.remat))
    names = {"attention/query": "query", "attention/key": "key", "attention/value": "value", "attention/out": "attention_out",
             "feedforward/gate": "gate", "feedforward/up": "up"}
    total = 0.0
    for path, spec in sizes.specs.items():
        module = "/".join(path.split("/")[1:-1])
        # The last product of a block is not needed again: only the next block's input is made of it. Of routed experts it is,
        # for the gradient of their weights; nothing of theirs has a name.
        if in_layers(path) and spec.num_inputs and module != "feedforward/down" and names.get(module) not in known:
            total += math.prod(spec.shape) * spec.share
    return total


def passes(config) -> int:
    """How often a layer's parameters are needed in a micro-batch: forward, backward, and when it is done again."""
    on_device, on_host = kept(config.model.remat)
    return 2 if config.model.remat == "none" or set(DOTS) <= {*on_device, *on_host} else 3


def moved(config, d: Dimensions, sizes: Sizes, axes, memory) -> tuple[float, float]:
    """-> bytes that (matrix products, everything else) move through memory in a step."""
    c, n = d.compute, d.tokens * d.accum
    layer_parameters = shard_size(sizes, axes, in_layers, whole=True)
    again = passes(config) - 2
    # A product reads two arrays and writes one; the backward pass has two products for each of the forward.
    arrays = d.q + 2 * d.kv + d.q + 2 * d.ups * d.F + d.F + 4 * d.D
    products = d.layers * n * c * arrays * (3 + again) + d.accum * layer_parameters * c * (4 + again)
    attention = d.layers * n * c * (2 * d.q + 2 * d.kv) * (4 + again)
    head = n * d.V * (4 + 3 * c) + d.accum * d.D * d.V * (2 * c + 8)
    others = d.layers * n * c * (8 * d.D / d.tensor + 6 * d.D + 6 * (d.q + d.kv)) * (2 + again) + 3 * n * d.V * c
    state = sum(memory.get(part, 0) for part in STATE)
    others += 2 * state + 2 * shard_size(sizes, axes) * 4 * d.accum + memory.get(FROZEN, 0) * d.accum
    others += passes(config) * d.accum * shard_size(sizes, axes, in_layers, whole=True) * c if d.fsdp > 1 else 0
    return products + attention + head, others


# ---- Network ----------------------------------------------------------------------------------------------------------------


def traffic(config, d: Dimensions, sizes: Sizes, axes) -> dict[str, float]:
    """Bytes that one device sends in a step, by kind and axis."""
    c, sent = d.compute, {}

    def add(kind, axis, size):
        if axes[axis] > 1:
            share = (axes[axis] - 1) / axes[axis] * (2 if kind == "all-reduce" else 1)
            sent[f"{kind} {axis}"] = sent.get(f"{kind} {axis}", 0.0) + size * share

    layers = shard_size(sizes, axes, in_layers, whole=True)
    rest = shard_size(sizes, axes, lambda path: not in_layers(path), whole=True)
    if config.mesh.zero_stage == 3:
        add("all-gather", "fsdp", d.accum * (passes(config) * layers + 2 * rest) * c)
        add("all-reduce", "fsdp", d.accum * layers * c + rest * 4)
    else:
        add("reduce-scatter", "fsdp", d.accum * (layers + rest) * 4)
        add("all-gather", "fsdp", (layers + rest) * 4)
    add("all-reduce", "data", d.accum * shard_size(sizes, axes) * 4)
    row = d.layers * d.accum * d.tokens * d.D * c
    add("all-gather", "tensor", row * 2 * passes(config))
    add("reduce-scatter", "tensor", row * 2 * passes(config))
    add("collective-permute", "context", 2 * d.kv * d.layers * d.accum * d.tokens * c * axes["context"] * (passes(config) + 1))
    if d.moe:
        add("all-to-all", "expert", 2 * config.model.experts_per_token * row * passes(config))
    add("collective-permute", "stage", 2 * d.accum * d.tokens * d.D * c * 2)
    return sent


def network_seconds(config, sent: dict[str, float], axes, chip: Chip, slices: int) -> float:
    """sent: {"all-gather fsdp": bytes, "all-reduce data+fsdp": ...}. One axis after the other, none beside another. Over slices
    or nodes, each device sends its own part once, and the rest goes round in its slice or node."""
    seconds, devices = 0.0, math.prod(axes.values())
    for name, size in sent.items():
        names = [axis for axis in name.split()[1].split("+") if axis in axes]
        members = math.prod(axes[axis] for axis in names)
        if members == 1:
            continue
        outer = slow_part(config, names, axes, chip)
        if outer > 1:
            seconds += size * (outer - 1) / (members - 1) / chip.slow_bandwidth
        if outer < members:
            seconds += size / bandwidth(chip, members // outer, devices // slices)
    return seconds


def slow_part(config, names: list[str], axes, chip: Chip) -> int:
    """Slices or nodes that these axes go over. TPU: as the config says. GPU: devices stand in the order of AXES, the last axis
    side by side, so an axis leaves the node where it and those behind it are more than one holds."""
    if chip.torus:
        return math.prod(getattr(config.mesh, f"dcn_{axis}") for axis in names if axis in SLOW)
    last = max(AXES.index(axis) for axis in names)
    step = math.prod(axes[axis] for axis in AXES[last + 1 :])  # from one member to the next
    members = math.prod(axes[axis] for axis in names)
    return min(members, max(1, members * step // chip.node))
