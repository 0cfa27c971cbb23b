"""The verdict on a run's curves, checkpoints averaged, and how both are shown."""

import json

import numpy as np
import pytest

from jaxlm.observe.fitting import judge, judge_run, noise
from jaxlm.observe.report import write_report

STEPS = np.arange(100, 2001, 100)


def curves(valid, train, sigma=0.0, seed=0):
    """-> (train, valid) of functions of the step; training is logged every 10 steps, with noise of its own."""
    rng, dense = np.random.default_rng(seed), np.arange(10, 2001, 10)
    return (list(zip(dense.tolist(), (train(dense) + 0.02 * rng.standard_normal(len(dense))).tolist(), strict=True)),
            list(zip(STEPS.tolist(), (valid(STEPS) + sigma * rng.standard_normal(len(STEPS))).tolist(), strict=True)))


falling = lambda x: 2 + 2 * np.exp(-x / 200)
rising_after = lambda x: falling(x) + np.maximum(0, x - 1200) * 4e-4
steep = lambda x: 3.5 - 1e-3 * x
CASES = {
    "over-fitting": (rising_after, lambda x: falling(x) - x * 4e-4),
    "worsening": (rising_after, lambda x: falling(x) + np.maximum(0, x - 1200) * 4e-4),
    "still learning": (steep, steep),
    "under-fitting": (falling, lambda x: falling(x) - 0.01),
    "fitted": (falling, lambda x: falling(x) - 0.3 * (1 - np.exp(-x / 300))),
}


@pytest.mark.parametrize("sigma", [0.0, 0.01])
@pytest.mark.parametrize("kind", list(CASES))
def test_each_kind_is_told_with_and_without_noise(kind, sigma):
    verdicts = [judge(*curves(*CASES[kind], sigma, seed)) for seed in range(10)]
    assert [v.kind for v in verdicts] == [kind] * 10
    if kind == "over-fitting":
        assert all(1000 <= v.since <= 1400 and f"over-fitting since step {v.since:,}" in v.text for v in verdicts)


def test_a_rise_within_the_noise_is_none():
    """Many runs that came to rest, of noise alone: the last evaluation is hardly ever the lowest, and that means nothing."""
    kinds = [judge(*curves(falling, lambda x: falling(x) - 0.3, 0.03, seed)).kind for seed in range(200)]
    assert kinds.count("over-fitting") + kinds.count("worsening") <= 4


def test_the_noise_is_told_from_the_evaluations():
    estimates = [noise(curves(steep, steep, 0.05, seed)[1]) for seed in range(100)]
    assert abs(np.mean(estimates) - 0.05) < 0.01
    uneven = [(x, 3.0 - 0.01 * x + 1e-5 * x**2) for x in (0, 10, 100, 101, 300)]
    assert noise(uneven) < 1e-9  # bent, and smooth


def test_little_is_said_of_little():
    train, valid = curves(*CASES["over-fitting"])
    assert judge(train, valid[:3]).kind == judge([], []).kind == "unknown"
    assert judge([], valid).kind == "over-fitting"  # validation alone
    few = [(100, 5.305), (200, 4.729), (300, 4.394), (400, 4.155), (500, 4.015)]  # of a real run
    assert judge([], few).kind == "still learning"
    few = [(12, 0.6226), (24, 0.6117), (36, 0.6526), (48, 0.6683), (60, 0.6675)]  # of another: few, but the gap tells
    assert judge([], few).kind == "fitted"
    assert judge([(s, 0.7 - 0.01 * s) for s in range(1, 61)], few).text.startswith("over-fitting since step 24")
    assert judge(train, [*valid, (2100, float("nan"))]).kind == "over-fitting"


def test_the_report_shows_verdict_and_gap(tmp_path):
    train, valid = curves(*CASES["over-fitting"])
    lines = [{"split": "train", "step": s, "loss": y} for s, y in train] + [
        {"split": "valid/all", "step": s, "loss": y, "perplexity": 1.0} for s, y in valid]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"split": "tr')
    verdict = judge_run(str(tmp_path))
    page = open(write_report(str(tmp_path))).read()
    assert verdict.kind == "over-fitting" and all(part in page for part in verdict.text.split(":", 1))
    assert 'class="gap"' in page and f"lowest at {verdict.since:,}" in page
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:5]))
    page = open(write_report(str(tmp_path))).read()
    assert 'class="gap"' not in page and "lowest at" not in page


# ---- Averages ----------------------------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_averaged_into_a_run(tmp_path, capsys):
    from jaxlm.cli import main
    from jaxlm.train.restore import open_run

    (tmp_path / "text.txt").write_text("to be or not to be that is the question " * 40)
    common = [f"--config.data.path={tmp_path}/text.txt", f"--config.data.store_dir={tmp_path}/stores", "--config.seq_len=8",
              "--config.batch_size=4", "--config.model.num_layers=1", "--config.model.embed_dim=16", "--config.model.num_heads=2",
              "--config.mesh.data=1", "--config.observe.report=False", "--config.observe.progress=none"]
    assert main(["train", "--config=configs/default.py", *common, f"--workdir={tmp_path}/run", "--config.steps=4",
                 "--config.checkpoint.every_steps=1", "--config.checkpoint.keep=3", "--config.optimizer.ema_decay=0.9"]) == 0
    assert judge_run(str(tmp_path / "run")).text in capsys.readouterr().out
    assert main(["average", f"--workdir={tmp_path}/run", f"--to={tmp_path}/mean", "--last=3"]) == 0
    assert "steps 2, 3, 4" in capsys.readouterr().out
    import jax

    from jaxlm.checkpoint.manager import Checkpoints

    run = open_run(str(tmp_path / "mean"))
    of = Checkpoints(str(tmp_path / "run" / "checkpoints"), 1, 0, False, create=False)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), run.params)
    each = [jax.device_get(of.restore_params(abstract, step=step)) for step in (2, 3, 4)]
    jax.tree.map(lambda mean, *of: np.testing.assert_allclose(mean, np.mean(np.float64(of), 0), atol=1e-7), run.params, *each)
    assert np.abs(run.params["embedding"] - each[-1]["embedding"]).max() > 1e-5
    assert main(["eval", f"--workdir={tmp_path}/mean", "--json"]) == 0
    assert "loss" in json.loads(capsys.readouterr().out)
    for more, said in ((["--last=4", f"--to={tmp_path}/b"], "keeps 3 checkpoints"),
                       ([f"--to={tmp_path}/mean", "--last=2"], "not empty"),
                       (["--last=0", f"--to={tmp_path}/b"], "at least 1")):
        assert main(["average", f"--workdir={tmp_path}/run", *more]) == 2
        assert said in capsys.readouterr().err
