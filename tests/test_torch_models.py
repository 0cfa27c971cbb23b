"""benchmarks/: the PyTorch models are jaxlm's to the last digit that float32 has, or a side-by-side would compare nothing."""

import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
STEPS = 3


def make_config(family, tie):
    from configs import default
    from jaxlm.config import resolve

    c = default.get_config()
    c.batch_size, c.seq_len = 4, 16
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 2, 32, 4, 48
    c.model.vocab_size, c.model.tie_embeddings, c.model.init_std = 40, tie, 0.2  # so that attention matters
    if family == "gpt2":
        c.model.norm, c.model.norm_eps, c.model.position, c.model.feedforward = "layer", 1e-5, "learned", "gelu"
        c.model.attention_bias = c.model.mlp_bias = True
    else:
        c.model.num_kv_heads = 2
    c.schedule.name, c.schedule.warmup_steps = "constant", 0
    c.optimizer.learning_rate, c.optimizer.eps = 1e-3, 1e-6  # a larger eps: Adam's first steps are else signs of noise
    resolve(c)
    return c


def batches_of(config):
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, (STEPS, config.batch_size, config.seq_len + 1))
    return [(r[:, :-1].astype(np.int32), r[:, 1:].astype(np.int32)) for r in rows]


def train_jaxlm(config):
    """-> (first parameters, last parameters, losses, gradient norms)."""
    import jax

    from jaxlm.objectives.build import build_objective
    from jaxlm.optimizers.build import build_optimizer
    from jaxlm.optimizers.schedules import build_schedule
    from jaxlm.train.state import build_init, build_model, flatten_paths
    from jaxlm.train.step import build_train_step

    model = build_model(config, config.model.vocab_size, "plain")
    optimizer = build_optimizer(config, model.specs)
    step = jax.jit(build_train_step(config, model, build_objective(config), optimizer, build_schedule(config)))
    state = jax.jit(build_init(config, model, optimizer))(0)
    # Biases and scales start at 0 and 1, where a wrong mapping of them would not show.
    rng = np.random.default_rng(1)
    state["params"] = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape).astype(np.float32), state["params"])
    first, metrics = flatten_paths(state["params"]), []
    hyper = {"learning_rate": np.float32(config.optimizer.learning_rate),
             "weight_decay": np.float32(config.optimizer.weight_decay), "seed": np.int32(0)}
    for tokens, targets in batches_of(config):
        ones = np.ones(tokens.shape, np.int32)
        batch = {"tokens": tokens, "targets": targets, "segment_ids": ones, "positions": np.arange(16, dtype=np.int32) * ones,
                 "loss_mask": ones.astype(np.float32)}
        state, out = step(state, batch, hyper)
        metrics.append((float(out["loss"]), float(out["grad_norm"])))
    return first, flatten_paths(state["params"]), *zip(*metrics, strict=True)


def train_torch(config, model):
    from torch_gpt import adamw_of

    optimizer, metrics = adamw_of(config, model), []
    for tokens, targets in batches_of(config):
        loss = model(torch.from_numpy(tokens).long(), torch.from_numpy(targets).long())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
        metrics.append((loss.item(), norm.item()))
    return zip(*metrics, strict=True)


@pytest.mark.parametrize("models", ["torch", "transformers"])
@pytest.mark.parametrize("family, tie", [("gpt2", True), ("llama", False)])
def test_same_training_as_jaxlm(family, tie, models):
    """Losses, gradient norms and every parameter after 3 steps of AdamW, clipped, with decay."""
    pytest.importorskip(models)
    if models == "torch":
        from torch_gpt import from_jaxlm
        from torch_gpt import gpt_of as build
    else:
        from hf_gpt import from_jaxlm
        from hf_gpt import hf_of as build

    config = make_config(family, tie)
    first, last, losses, norms = train_jaxlm(config)
    tensors = lambda arrays: {path: torch.from_numpy(np.array(a)) for path, a in arrays.items()}
    model = build(config, config.model.vocab_size)
    model.load_state_dict(from_jaxlm(tensors(first)))
    assert sum(p.numel() for p in model.parameters()) == sum(a.size for a in first.values())
    torch_losses, torch_norms = train_torch(config, model)
    np.testing.assert_allclose(torch_losses, losses, atol=2e-5)
    np.testing.assert_allclose(torch_norms, norms, rtol=2e-4)
    before, state = from_jaxlm(tensors(first)), model.state_dict()
    for name, want in from_jaxlm(tensors(last)).items():
        assert (want - before[name]).abs().max() > 1e-4, f"{name} did not move: nothing is compared"
        torch.testing.assert_close(state[name], want, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_config_that_the_models_do_not_have_is_refused():
    from torch_gpt import gpt_of

    config = make_config("llama", True)
    config.model.qk_norm = True
    with pytest.raises(ValueError, match="qk_norm"):
        gpt_of(config, 40)


@pytest.mark.parametrize("size", ["124M", "1.2B", "8B", "8x256"])
def test_sizes_have_as_many_parameters_as_jaxlm(size):
    from arms import config_of
    from torch_gpt import gpt_of

    from jaxlm.train.state import build_model

    config = config_of(size)
    with torch.device("meta"):
        model = gpt_of(config, config.model.vocab_size)
    assert sum(p.numel() for p in model.parameters()) == build_model(config, config.model.vocab_size, "plain").num_parameters


@pytest.mark.parametrize("change, passed", [(0.0, True), (0.02, False), (float("nan"), False)])
@pytest.mark.parametrize("what, index", [("losses", 50), ("grad_norms", 0)])
def test_the_parity_gate_stops_an_arm_that_differs(what, index, change, passed):
    from compare import parity

    reference = {"losses": [3.0] * 51, "grad_norms": [0.2] * 51}
    mine = {name: list(values) for name, values in reference.items()}
    mine[what][index] += change
    assert parity(reference, mine, "gpu")["passed"] == passed
