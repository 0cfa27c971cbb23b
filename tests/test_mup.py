"""Parametrisations: the standard one at the tuned model's own size, and activations that move alike at every width beyond."""

import jax
import numpy as np
import pytest

from configs import default
from jaxlm.config import resolve
from jaxlm.errors import UserError
from jaxlm.models.parametrization import Parametrization, build_parametrization, is_hidden
from jaxlm.optimizers.build import build_optimizer
from jaxlm.research.mup import Slope, at_width, best_rate, coordinate_check, table, transfer
from jaxlm.train.loop import train
from jaxlm.train.state import build_model, flatten_paths
from jaxlm.train.step import build_program
from jaxlm.validation import validate


def make(tmp_path=None, parametrization="standard", **model):
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 3, 4, 16
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 32, 2
    c.optimizer.learning_rate, c.mesh.data = 3e-3, 1
    c.data.source, c.model.vocab_size = "synthetic", 64
    c.observe.progress, c.observe.report, c.observe.log_every = "none", False, 1
    c.model.parametrization = parametrization
    if parametrization != "standard":
        c.model.base_embed_dim = 32
    if parametrization == "completep":
        c.model.base_num_layers = c.model.num_layers
    c.model.update(model)
    resolve(c)
    validate(c)
    return c


BROKEN = {"hidden learning rates that stay": ("learning_rate", lambda self, spec, optimizer: 1.0),
          "logits that are not divided": ("logits", 1.0),
          "logits divided twice": ("logits", property(lambda self: self.width**-2))}


@pytest.mark.parametrize("name", ["mup", "standard", *BROKEN])
def test_the_coordinate_check_passes_for_mup_and_for_nothing_else(name, monkeypatch):
    if name in BROKEN:
        monkeypatch.setattr(Parametrization, *BROKEN[name])
    found = coordinate_check(make(parametrization="standard" if name == "standard" else "mup"), (32, 256), steps=3, seeds=2)
    print(table(found), found["verdict"], sep="\n")
    exponents = {(s["name"], s["moved"]): s["exponent"] for s in found["slopes"]}
    off = {(s["name"], s["moved"]): s["error"] for s in found["slopes"] if abs(s["error"]) > 0.25}
    assert found["passes"] == (not off) == (name == "mup")
    assert found["verdict"].startswith("passes" if name == "mup" else "fails")
    assert len(exponents) == 23 and abs(exponents["embedding", False]) < 0.1
    if name == "standard":
        assert off["0.query", False] == pytest.approx(0.5, abs=0.1) and off["0.down", True] > 1
    elif name == "hidden learning rates that stay":
        assert off["0.down", True] > 1 and all(moved for _, moved in off)
    elif name in BROKEN:
        sign = 1 if "not" in name else -1
        assert sign * exponents["loss", True] > 0.75
        assert set(off) == {("logits", False), ("logits", True), ("loss", True)}


def test_logits_may_fall_as_a_random_head_makes_them():
    assert Slope("logits", True, -0.3, -0.5, {}).error == 0 == Slope("hidden", True, 0.0, 0.0, {}).error
    assert Slope("logits", True, -0.8, -0.5, {}).error == pytest.approx(-0.3)
    assert Slope("logits", True, 0.3, -0.5, {}).error == Slope("hidden", True, 0.3, 0.0, {}).error == 0.3


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_at_the_tuned_size_it_is_the_standard_parametrisation(name):
    """Number for number: the jaxpr of the step and the first parameters."""
    a, b = (build_program(make(parametrization=p), 64) for p in ("standard", name))
    assert str(jax.make_jaxpr(a.train_step)(*a.inputs)) == str(jax.make_jaxpr(b.train_step)(*b.inputs))
    first = [jax.jit(p.init)(0)["params"] for p in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *first)


def test_sizes_and_learning_rates_follow_width():
    """Table 8 of arXiv:2203.03466, at four times the width, and table 1 of arXiv:2505.01618, at twice the depth too."""
    c = make(parametrization="completep", embed_dim=128, num_heads=8, num_layers=2, base_num_layers=1, tie_embeddings=False)
    model = build_model(c, 64, "plain")
    scaling, specs = build_parametrization(c.model), flatten_paths(model.specs)
    params = flatten_paths(model.init(jax.random.key(0)))
    hidden = {path for path, spec in specs.items() if is_hidden(spec)}
    assert hidden == {f"layers/{part}/kernel" for part in (
        *(f"attention/{x}" for x in ("query", "key", "value", "out")), *(f"feedforward/{x}" for x in ("up", "gate", "down")))}
    for path, spec in specs.items():
        assert scaling.learning_rate(spec, "adamw") == (1 / 4 if path in hidden else 1)
        assert scaling.learning_rate(spec, "muon") == 1
        assert scaling.epsilon(spec) == (1 / 8 if path.startswith("layers/") else 1 / 4)
    std = {path: float(np.std(params[path])) for path in specs}
    assert std["embedding"] == pytest.approx(0.02, rel=0.05) and std["head/kernel"] == pytest.approx(0.02, rel=0.05)
    assert std["layers/feedforward/up/kernel"] == pytest.approx(0.02 / 2, rel=0.05)
    assert std["layers/feedforward/down/kernel"] == pytest.approx(0.02 / 2 / 2**0.5, rel=0.05)  # as if one layer deep
    assert (scaling.logits, scaling.branch, scaling.queries) == (1 / 4, 1 / 2, 1)
    wide = make(parametrization="mup", embed_dim=128, num_heads=2, base_head_dim=16)
    assert wide.model.head_dim**-0.5 * build_parametrization(wide.model).queries == pytest.approx(16**0.5 / 64)  # of 1/d


def test_weight_decay_keeps_its_product_with_the_learning_rate():
    c = make(parametrization="mup", embed_dim=128, num_heads=8)
    model = build_model(c, 64, "plain")
    params = model.init(jax.random.key(0))
    zero = jax.tree.map(np.zeros_like, params)
    optimizer = build_optimizer(c, model.specs)
    after, _ = optimizer.update(zero, optimizer.init(params), params, 0.1, 0.5)
    for path in ("embedding", "layers/feedforward/up/kernel"):
        np.testing.assert_allclose(flatten_paths(after)[path], flatten_paths(params)[path] * (1 - 0.1 * 0.5), rtol=1e-6)


def test_what_has_no_rule_is_refused():
    with pytest.raises(UserError) as error:
        make(parametrization="mup", base_embed_dim=0, feedforward="moe", lora_rank=4)
    assert len(error.value.problems) == 3 and "base_embed_dim=0" in str(error.value)
    c = make(parametrization="mup")
    c.optimizer.name = "sgd"
    with pytest.raises(UserError, match="optimizer.name='sgd'"):
        validate(c)
    with pytest.raises(UserError, match="no whole|would become"):
        at_width(make(), 40)
    c = make()
    c.model.base_embed_dim = 64  # read by mup alone
    with pytest.raises(UserError, match=r"model.base_embed_dim=64: is set, but nothing"):
        train(c, "unused")


def test_the_best_rate_is_between_those_tried():
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    loss = lambda rate: (np.log(rate) - np.log(3e-3)) ** 2
    assert best_rate({rate: loss(rate) for rate in rates}) == pytest.approx(3e-3, rel=1e-6)
    assert best_rate({rate: rate for rate in rates}) == pytest.approx(1e-3)
    assert best_rate({1e-3: 2.0, 2e-3: 1.0, 4e-3: float("inf")}) == pytest.approx(2e-3)


def test_the_experiment_runs_and_goes_on(tmp_path):
    c = make(parametrization="mup")
    c.data.source, c.data.store_dir, c.model.vocab_size, c.eval.batches = "files", str(tmp_path / "stores"), 0, 1
    found = transfer(c, (32, 64), (1e-3, 1e-2), str(tmp_path / "runs"))
    assert set(found["widths"]) == {32, 64} and "best learning rate" in found["verdict"]
    assert (tmp_path / "runs" / "64" / "lr0.01-seed0" / "checkpoints" / "3").is_dir()
    assert transfer(c, (32, 64), (1e-3, 1e-2), str(tmp_path / "runs")) == found
