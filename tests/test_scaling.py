"""Scaling laws: known parameters are found again within the stated intervals, families are what they say, a prediction is made
before its run and scored after it. The runs are written here, by a known law."""

import json

import numpy as np
import pytest

from configs import default
from jaxlm.cli import main
from jaxlm.config import fingerprint, load, resolve
from jaxlm.errors import UserError
from jaxlm.research import law as laws
from jaxlm.research import prediction
from jaxlm.research.law import Law, Observations
from jaxlm.research.scaling import fixed_ratio, inner_parameters, isoflop, size_near, size_of, with_shape
from jaxlm.research.sweep import plan
from jaxlm.validation import validate

TRUE = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al., equation 10
SIZES, RATIOS = (1e7, 2e7, 4e7, 8e7, 1.6e8), (5, 10, 20, 40)
GRID = np.array([(n, r * n) for n in SIZES for r in RATIOS]).T


def observed(noise: float = 0.0, seed: int = 0, law=TRUE, grid=GRID) -> Observations:
    clean = law.loss(*grid)
    return Observations(*grid, clean * np.exp(np.random.default_rng(seed).normal(0, 1, clean.shape) * noise))


# ---- The fit -------------------------------------------------------------------------------------------------------------------


def test_without_noise_the_law_is_found_exactly():
    for law in (TRUE, Law(0.8, 20, 0.5, 2000, 0.45), Law(2.6, 5000, 0.55, 30, 0.15)):
        assert laws.fit_law(observed(law=law)) == pytest.approx(law, rel=1e-4)


def test_the_objective_is_the_papers():
    """Written out: log-sum-exp, Huber with delta 1e-3, summed; the gradient by differences."""
    x, y, log_loss = np.random.default_rng(0).normal(0, 1, (3, 9))
    log_loss[:4] = np.log(np.exp(0.2) + np.exp(0.3 - 0.4 * x) + np.exp(0.1 - 0.5 * y))[:4] + [4e-4, -4e-4, 2e-3, -2e-3]
    point = np.array([0.2, 0.3, 0.1, 0.4, 0.5])
    residuals = np.log(np.exp(0.2) + np.exp(0.3 - 0.4 * x) + np.exp(0.1 - 0.5 * y)) - log_loss
    huber = np.where(np.abs(residuals) <= 1e-3, residuals**2 / 2, 1e-3 * (np.abs(residuals) - 5e-4)).sum()
    value, gradient = laws.objective(point, x, y, log_loss)
    assert value == pytest.approx(huber / 1e-6)
    steps = [(laws.objective(point + 1e-8 * e, x, y, log_loss)[0] - laws.objective(point - 1e-8 * e, x, y, log_loss)[0]) / 2e-8
             for e in np.eye(5)]
    assert gradient == pytest.approx(steps, rel=1e-3)


def test_one_bad_run_moves_it_little():
    seen = observed(0.001)
    spoilt = seen._replace(loss_N=np.where(np.arange(20) == 7, seen.loss_N * 1.2, seen.loss_N))
    clean, robust = laws.fit_law(seen), laws.fit_law(spoilt)
    assert robust.loss(6e8, 1.2e10) == pytest.approx(clean.loss(6e8, 1.2e10), rel=0.01)


def test_intervals_hold_what_they_promise():
    """Coverage of 80 % intervals over repeated simulations: 12.8 of 16, give or take 1.6; docs/research.md has a larger one."""
    held = {name: 0 for name in (*laws.PARAMETERS, "compute_exponent", "prediction")}
    for seed in range(16):
        fitted = laws.fit(observed(0.003, seed), resamples=30)
        for name in held:
            if name == "prediction":
                _, low, high = fitted.predict(6.4e8, 1.28e10, 0.8)
                truth = TRUE.loss(6.4e8, 1.28e10) * np.exp(np.random.default_rng(1000 + seed).normal() * 0.003)
            else:
                (low, high), truth = fitted.interval(lambda law, name=name: getattr(law, name), 0.8), getattr(TRUE, name)
            held[name] += low <= truth <= high
    assert all(9 <= count for count in held.values()), held


@pytest.mark.parametrize("grid, said", [
    ([(n, 10 * n) for n in SIZES], "5 runs for 5 parameters"),
    ([(1e7, d) for d in np.geomspace(1e7, 1e9, 8)], "all runs have one size"),
    ([(n, 1e9) for n in np.geomspace(1e7, 1e9, 8)], "all runs saw as many tokens"),
    ([(n, 20 * n) for n in np.geomspace(1e7, 1e9, 8)], "same tokens per parameter"),
    ([(n, r * n) for n in (1e7, 2e7) for r in RATIOS], "there are 2 sizes")])
def test_what_cannot_be_told_is_said(grid, said):
    with pytest.raises(UserError, match=said):
        laws.fit(observed(grid=np.array(grid).T))


def test_parabolas_find_the_best_size():
    """Close to the minimum a parabola in log N is what the law is."""
    budgets = np.geomspace(1e17, 1e19, 4)
    ratio = (TRUE.alpha * TRUE.A / (TRUE.beta * TRUE.B)) ** (1 / (TRUE.alpha + TRUE.beta))
    best = ratio * (budgets / 6) ** TRUE.compute_exponent
    rows = np.array([(n, c / (6 * n), c) for c, b in zip(budgets, best, strict=True) for n in b * np.geomspace(0.6, 1.7, 5)])
    seen = Observations(rows[:, 0], rows[:, 1], TRUE.loss(rows[:, 0], rows[:, 1]))
    found = laws.parabolas(seen, rows[:, 2])
    assert [p.best_parameters for p in found] == pytest.approx(best, rel=0.02)
    exponent, (low, high) = laws.optimal_exponent(found)
    assert exponent == pytest.approx(TRUE.compute_exponent, abs=0.003) and low - 1e-9 < exponent < high + 1e-9
    left = rows[np.tile(np.arange(5) < 3, 4)]
    beside = laws.parabolas(Observations(left[:, 0], left[:, 1], 9 - np.log(left[:, 0]) / 9), left[:, 2])
    assert all(p.best_parameters is None and p.words for p in beside) and laws.optimal_exponent(beside) is None


# ---- Families ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base():
    c = default.get_config()
    c.batch_size, c.seq_len = 8, 64
    c.model.embed_dim, c.model.num_heads, c.model.num_layers, c.model.mlp_dim = 64, 2, 2, 176
    c.model.vocab_size = 300
    return c


def test_sizes_are_near_and_their_heads_divide(base):
    for wanted in (1e5, 4e5, 3e6):
        size = size_near(base, wanted)
        built = base.copy_and_resolve_references()
        built.update_from_flattened_dict(size.overrides)
        resolve(built)
        validate(built)
        assert built.model.head_dim == 32 and size.parameters == pytest.approx(wanted, rel=0.15)
        m = built.model
        matrices = m.num_layers * (4 * m.embed_dim**2 + 3 * m.embed_dim * m.mlp_dim)  # by hand
        norms = m.embed_dim * (2 * m.num_layers + 1)
        assert inner_parameters(built) == size.parameters == matrices + norms
        assert size.flops == 6 * (matrices + 300 * m.embed_dim) + 6 * m.embed_dim * m.num_layers * 64


def test_grouped_heads_stay_together(base):
    c = base.copy_and_resolve_references()
    c.model.num_heads, c.model.num_kv_heads = 4, 2
    resolve(c)
    shaped = with_shape(c, 6, 2).model
    assert (shaped.num_heads, shaped.num_kv_heads, shaped.embed_dim) == (6, 3, 96)
    assert all(size_near(c, n).overrides["model.num_heads"] % 2 == 0 for n in (1e5, 1e6))


def test_families_spend_what_they_say(base):
    runs = [o for _, o in fixed_ratio(base, (1e5, 2e5), (1, 4))]
    assert [o["steps"] * 8 * 64 for o in runs] == pytest.approx(
        [r * size_near(base, n).parameters for n in (1e5, 2e5) for r in (1, 4)], rel=0.01)
    for name, o in isoflop(base, (2e12,), sizes=3, tokens_per_parameter=5):
        built = base.copy_and_resolve_references()
        built.update_from_flattened_dict(o)
        resolve(built)
        assert o["steps"] * 8 * 64 * size_of(built).flops == pytest.approx(2e12, rel=0.02) and "tokens" in name


def test_families_that_cannot_be_are_refused(base):
    with pytest.raises(UserError, match="take sizes farther apart"):
        list(fixed_ratio(base, (1e5, 1.01e5), (4,)))
    with pytest.raises(UserError, match="steps of 8 x 64"):
        list(fixed_ratio(base, (1e5,), (0.01,)))
    with pytest.raises(UserError, match="at least 3 sizes"):
        list(isoflop(base, (1e12,), sizes=2))
    c = base.copy_and_resolve_references()
    c.model.vocab_size = 0
    with pytest.raises(UserError, match=r"set model\.vocab_size"):
        list(isoflop(c, (1e12,)))


# ---- Prediction and score ------------------------------------------------------------------------------------------------------

SMALL = Law(2.0, 150, 0.34, 300, 0.35)


def make_run(folder, base, overrides, loss=None, status="completed", noise=0.0, **record):
    """A run directory whose loss is the law's."""
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(overrides)
    resolve(config)
    tokens = config.steps * config.batch_size * config.seq_len
    loss = loss or float(SMALL.loss(inner_parameters(config), tokens)) * float(np.exp(noise))
    folder.mkdir(parents=True)
    values = {"config": json.loads(config.to_json()), "fingerprint": fingerprint(config), "data": "text",
              "started": "2999-01-01T00:00:00+00:00", **record}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text(json.dumps({"split": "valid/all", "step": config.steps, "loss": loss}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"status": status, "steps": config.steps, "flops": 1e9 * tokens}))
    return loss


@pytest.fixture(scope="module")
def family(base, tmp_path_factory):
    """Four sizes with three ratios, runs 0.3 % off the law; one more that diverged."""
    folder = tmp_path_factory.mktemp("family")
    noise = np.random.default_rng(3).normal(0, 0.003, 12)
    for i, (name, overrides) in enumerate(fixed_ratio(base, (1e5, 2e5, 4e5, 8e5), (1, 2, 4))):
        make_run(folder / name.replace(", ", "-"), base, overrides, noise=noise[i])
    make_run(folder / "bad", base, {"steps": 77}, status="diverged")
    return folder


@pytest.fixture
def larger(base, tmp_path):
    """A config file of the run that is held back; its overrides."""
    (_, overrides), = fixed_ratio(base, (1.6e6,), (2,))
    changes = {**overrides, "batch_size": 8, "seq_len": 64, "model.vocab_size": 300}
    (tmp_path / "larger.py").write_text("from configs import default\ndef get_config(arg=''):\n    c = default.get_config()\n"
                                        f"    c.update_from_flattened_dict({changes!r})\n    return c\n")
    return overrides


def test_a_prediction_is_made_before_its_run_and_scored_after_it(family, base, larger, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["scale", "--fit", str(family), "--predict", f"--config={tmp_path / 'larger.py'}", f"--workdir={run}",
               f"--out={out}"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "12 runs" in said and "bad: diverged, and is left out" in said and "digest" in said
    made = json.loads((out / "prediction.json").read_text())
    assert made["interval"][0] < made["loss"] < made["interval"][1]
    assert made["beyond"]["parameters"] == pytest.approx(1.95, abs=0.05)
    assert main(command) == 2 and "stays as it was made" in capsys.readouterr().err

    score = ["scale", f"--score={out}", f"--workdir={run}"]
    assert main(score) == 2 and "no config.json there" in capsys.readouterr().err
    make_run(run, base, larger, started="2000-01-01T00:00:00+00:00")
    assert main(score) == 2 and "before the prediction" in capsys.readouterr().err
    assert main([*command[:-1], f"--out={tmp_path / 'late'}"]) == 2 and "that run has begun" in capsys.readouterr().err
    measured = make_run(tmp_path / "good", base, larger)
    assert main([*score[:-1], f"--workdir={tmp_path / 'good'}"]) == 0
    assert f"inside: measured {measured:.4f}" in capsys.readouterr().out
    assert json.loads((out / "score.json").read_text())["inside"]
    page = (out / "scaling.html").read_text()
    assert "Inside: measured" in page and made["digest"] in page and "src=" not in page and "href=" not in page
    make_run(tmp_path / "far", base, larger, loss=measured * 1.2)
    assert main([*score[:-1], f"--workdir={tmp_path / 'far'}"]) == 0 and "outside: measured" in capsys.readouterr().out
    make_run(tmp_path / "other", base, {**larger, "optimizer.name": "lion"})
    assert main([*score[:-1], f"--workdir={tmp_path / 'other'}"]) == 2 and "optimizer.name" in capsys.readouterr().err
    (out / "prediction.json").write_text(json.dumps({**made, "interval": [0, 99]}))
    assert main([*score[:-1], f"--workdir={tmp_path / 'far'}"]) == 2 and "changed after it was made" in capsys.readouterr().err


def test_runs_of_two_recipes_are_no_law(family, base, tmp_path):
    make_run(tmp_path / "norm", base, {"model.norm": "layer", "steps": 50})
    with pytest.raises(UserError, match=r"model\.norm: (rms|layer) -> (rms|layer)"):
        prediction.fit_runs([str(family), str(tmp_path / "norm")], str(tmp_path / "out"))
    make_run(tmp_path / "text", base, {"steps": 51}, data="another")
    with pytest.raises(UserError, match="the text itself"):
        prediction.fit_runs([str(family), str(tmp_path / "text")], str(tmp_path / "out"))


def test_too_few_that_ended_well_are_told_with_why(base, tmp_path):
    for i in range(3):
        make_run(tmp_path / f"runs/{i}", base, {"steps": 50 * (i + 1)}, status="diverged" if i else "completed")
    with pytest.raises(UserError) as error:
        prediction.fit_runs([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert "diverged" in str(error.value.problems) and "1 run for 5 parameters" in str(error.value.problems)


@pytest.mark.parametrize("arguments, said", [
    ([], "give --fit"), (["--fit", "x"], "--fit: needs --out"), (["--score=x"], "--score: needs --workdir"),
    (["--fit", "x", "--out=y", "--predict"], "--predict: needs --config"),
    (["--fit", "x", "--out=y", "--level=2"], "--level=2.0"),
    (["--fit", "x", "--out=y", "--config.steps=3"], "--config: is of --predict")])
def test_wrong_arguments_are_one_line_each(arguments, said, capsys):
    assert main(["scale", *arguments]) == 2 and said in capsys.readouterr().err


def test_the_family_on_wikitext_2_holds_back_its_largest():
    file = "configs/ablations/scaling_wikitext2.py"
    runs, largest = plan(file, [], "runs").runs, load(f"{file}:largest")
    assert len(runs) == 12 and all(prediction.recipe(run.config) == prediction.recipe(largest) for run in runs)
    sizes = sorted({inner_parameters(run.config) for run in runs} | {inner_parameters(largest)})
    assert len(sizes) == 5 and sizes[-1] == inner_parameters(largest) and 0.4e5 < sizes[0] and sizes[-1] < 0.9e6
    load(f"{file}:debug")
