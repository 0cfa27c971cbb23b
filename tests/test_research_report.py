"""Reports of several runs: what is said of them, what is refused; two runs compared bit for bit. The runs are written here."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs import default
from jaxlm.cli import main
from jaxlm.config import fingerprint, flatten, load
from jaxlm.errors import UserError
from jaxlm.research import noise, tables
from jaxlm.research.page import page
from jaxlm.research.report import analyse
from jaxlm.research.runs import arms_of, read_runs

LOSSES = 1.50 + np.array([0.004, -0.003, 0.001, 0.002, -0.004])  # of the baseline, by seed


def make_run(folder, loss, seed=0, status="completed", text="text", **overrides):
    """A run directory; overrides: group__key=value."""
    config = default.get_config()
    config.seed = seed
    for key, value in overrides.items():
        group, _, leaf = key.rpartition("__")
        (config[group] if group else config)[leaf] = value
    folder.mkdir(parents=True)
    record = {"config": json.loads(config.to_json()), "fingerprint": fingerprint(config), "data": text, "commit": "abc"}
    (folder / "config.json").write_text(json.dumps(record))
    lines = [{"split": "train", "step": step, "loss": loss + 3 / step, "tokens_per_second": 100.0 + seed, "step_seconds": 0.5,
              "elapsed_seconds": 9.0} for step in range(10, 101, 10)]
    lines += [{"split": "valid/all", "step": step, "loss": float(loss) + (100 - step) / 100, "bits_per_byte": float(loss) * 1.5}
              for step in (50, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"status": status, "valid_loss": float(loss), "train_loss": float(loss), "tokens": 1000, "flops": 1e9, "devices": 1,
               "device_kind": "cpu", "tokens_per_second": 100.0, "parameters": 10, "jax_version": "0"}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def sweep(tmp_path):
    """Three arms and five seeds: the baseline, a better one that follows it closely, and one that only looks better."""
    lucky = LOSSES + np.array([0.01, -0.02, 0.008, -0.01, 0.006])
    for seed, loss in enumerate(LOSSES):
        make_run(tmp_path / "s/base" / f"seed-{seed}", loss, seed)
        make_run(tmp_path / "s/good" / f"seed-{seed}", loss - 0.01 + 0.001 * (-1) ** seed, seed, optimizer__name="muon")
        make_run(tmp_path / "s/lucky" / f"seed-{seed}", lucky[seed], seed, model__norm="layer", model__qk_norm=True)
    return tmp_path / "s"


def report_of(folder, cache, **choices):
    return analyse([str(folder)], str(folder), str(cache), **choices)


def test_what_is_better_is_said_and_what_is_luck_is_not(sweep, tmp_path):
    report = report_of(sweep, tmp_path / "cache")
    base, good, lucky = report["arms"]
    assert good["difference"] == pytest.approx(-0.01 + 0.001 / 5) and good["comparison"]["verdict"] == "better"
    assert lucky["difference"] < 0 and lucky["comparison"]["verdict"] == "not significant"
    assert good["comparison"]["t"][0] < good["difference"] < good["comparison"]["t"][1] < 0
    assert lucky["comparison"]["detectable"] > abs(lucky["difference"])
    assert "good is better than base by 0.0098" in report["summary"] and "lucky: not significant" in report["summary"]
    assert base["mean"] == pytest.approx(LOSSES.mean()) and base["std"] == pytest.approx(LOSSES.std(ddof=1))
    assert good["config_diff"] == [("optimizer.name", "adamw -> muon")] and [key for key, _ in lucky["config_diff"]] == [
        "model.norm", "model.qk_norm"]
    assert base["train_seconds"] == 50 and base["curve"] == [
        [50, pytest.approx(LOSSES.mean() + 0.5), pytest.approx(base["std"])], [100, pytest.approx(base["mean"]), base["std"]]]
    assert report_of(sweep, tmp_path, baseline="good")["arms"][0]["comparison"]["verdict"] == "worse"


def test_pairing_is_what_finds_it(sweep, tmp_path):
    """Good follows the baseline seed by seed: as independent runs only twice as much is seen."""
    paired, alone = (report_of(sweep, tmp_path, test=test)["arms"][1]["comparison"] for test in ("paired", "welch"))
    assert (paired["paired"], alone["paired"]) == (True, False)
    assert paired["detectable"] < alone["detectable"] / 2 and paired["p"] < alone["p"]


def test_the_page_and_the_tables_say_the_same(sweep, tmp_path, capsys):
    assert main(["report", str(sweep), f"--out={tmp_path / 'out'}"]) == 0
    assert "good is better than base" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    page, markdown, latex = ((tmp_path / "out" / name).read_text() for name in ("report.html", "table.md", "table.tex"))
    for text in (page, markdown, latex):
        assert "not significant" in text and f"{report['arms'][1]['mean']:.4f}" in text
    assert not re.search(r"(src|href)=\"http|<script|@import", page)  # opens with no network
    assert page.count("<svg") == page.count("</svg>") == 5 and "nan" not in page.lower().replace("nano", "")
    assert 'href="../s/good/seed-0/report.html"' in page and str(tmp_path) not in page + json.dumps(report)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and len({row.count("|") for row in rows}) == 1
    body = latex[latex.index(r"\midrule"):latex.index(r"\bottomrule")].splitlines()[1:]
    assert len([row for row in body if row.endswith(r"\\")]) == 3 and all(row.count("&") == 5 for row in body if row)


def test_names_cannot_break_the_page_or_the_tables(tmp_path):
    for seed in range(2):
        make_run(tmp_path / "s/base" / f"seed-{seed}", 1.5 + seed / 100, seed)
        make_run(tmp_path / "s/<b>&_% | $x" / f"seed-{seed}", 1.4 + seed / 90, seed, steps=99)
    report = report_of(tmp_path / "s", tmp_path)
    assert "<b>&_%" not in page(report) and "&lt;b&gt;&amp;_%" in page(report)
    assert r"<b>\&\_\% | \$x" in tables.latex(report) and r"<b>&_% \| $x" in tables.markdown(report)
    assert tables.listed(["a", "b"]) == "a, b" and tables.listed(["a", "b, c"]) == "“a”, “b, c”"


def test_other_data_is_no_pair(sweep, tmp_path, capsys):
    for seed, loss in enumerate(LOSSES):
        make_run(sweep / "shuffled" / f"seed-{seed}", loss, seed, data__shuffle=False)
        make_run(sweep / "text" / f"seed-{seed}", loss, seed, text="other", steps=999)
    report = report_of(sweep, tmp_path)
    by_name = {arm["name"]: arm["comparison"] for arm in report["arms"] if arm["comparison"]}
    assert [by_name[name]["paired"] for name in ("good", "lucky", "shuffled", "text")] == [True, True, False, False]
    assert "shuffled: compared as independent runs, as its data order is another (data.shuffle: True -> False)" in report["notes"]
    assert main(["report", str(sweep), "--test=paired"]) == 2
    assert "shuffled and base: their runs saw other rows, or in another order" in (error := capsys.readouterr().err)
    assert "--test=welch" in error and error.count("\n") == 1


def test_one_seed_has_no_interval_but_may_have_known_noise(sweep, tmp_path):
    cache = str(tmp_path / "cache")
    noise.store(arms_of(read_runs([str(sweep)])), str(sweep), cache)
    near = make_run(tmp_path / "near", LOSSES[0] + 0.005, model__norm="layer")
    far = make_run(tmp_path / "far", LOSSES[0] + 0.5, optimizer__name="lion")
    paths = [str(sweep / "base/seed-0"), str(near), str(far)]
    report = analyse(paths, str(tmp_path), cache)
    assert "seed-0" not in report["baseline"]
    assert any("one finished run, of which no interval and no p-value can be told; run at least 3" in n for n in report["notes"])
    known = report["noise"]
    assert known["runs"] == 5 and known["std"] == pytest.approx(LOSSES.std(ddof=1))
    assert known["between_two"] == pytest.approx(2.776 * 2**0.5 * known["std"], rel=1e-3)  # t of 4 degrees of freedom
    assert all(arm["comparison"] is None and arm["interval"] is None for arm in report["arms"])
    assert "less than the noise of this preset" in report["arms"][1]["note"]
    assert "more than the noise of this preset" in report["arms"][2]["note"]
    assert analyse(paths, str(tmp_path), str(tmp_path / "empty"))["noise"] is None
    assert "nothing can be said with confidence" in report["summary"]


@pytest.mark.parametrize("file", sorted(noise.SHIPPED.rglob("*.json")), ids=lambda file: file.stem)
def test_the_noise_of_a_preset_is_that_of_its_experiment(file, tmp_path):
    """But for the steps in its name. If this fails the preset has changed: measure it anew, or remove it."""
    record, = json.loads(file.read_text())
    preset, _, steps = str(file.relative_to(noise.SHIPPED).with_suffix("")).partition("-")
    config = load(f"configs/{preset}.py", [f"--config.steps={steps}"] if steps else [])
    run = make_run(tmp_path / "run", 2.0, seed=9, **{key.replace(".", "__"): value for key, value in flatten(config).items()
                                                     if key != "seed" and value != flatten(default.get_config())[key]})
    report = analyse([str(run)], str(tmp_path), str(tmp_path / "empty"))
    metric = record["metrics"][f"{report['metric']['split']}:{report['metric']['name']}"]
    assert report["noise"]["source"] == "shipped with the preset" and report["noise"]["runs"] == metric["runs"] >= 5
    assert f"Noise, shipped with the preset: over {metric['runs']} seeds" in page(report)
    about = f"{metric['runs']} | {metric['mean']:.4f} | {metric['std']:.4f} | {report['noise']['between_two']:.3f}"
    assert f"| `{preset}.py`{f', {steps} steps' * bool(steps)} | {about} |" in pathlib.Path("docs/research.md").read_text()


def test_more_repeats_replace_fewer_and_never_the_other_way(sweep, tmp_path):
    cache = tmp_path / "cache"
    arms = arms_of(read_runs([str(sweep / "base")]))
    for count, kept in ((4, 4), (5, 5), (3, 5)):
        arms[0].runs = sorted(read_runs([str(sweep / "base")]), key=lambda run: run.seed)[:count]
        noise.store(arms, str(sweep), str(cache))
        assert len(json.loads((cache / "noise" / f"{arms[0].experiment}.json").read_text())["seeds"]) == kept
    assert noise.measure(arms_of(read_runs([str(sweep / "base/seed-0"), str(sweep / "base/seed-1")]))[0]) is None


def test_runs_that_diverged_are_told_and_left_out(sweep, tmp_path):
    for seed, loss in enumerate(LOSSES):
        make_run(sweep / "wild" / f"seed-{seed}", loss - 0.1, seed, "diverged" if seed < 2 else "completed", optimizer__b1=0.5)
    report = report_of(sweep, tmp_path)
    wild = next(arm for arm in report["arms"] if arm["name"] == "wild")
    assert wild["comparison"]["runs"] == 3 and [run["value"] is None for run in wild["runs"]] == [True, True, False, False, False]
    assert "wild: 2 of 5 runs did not end well (diverged); the figures are of the others" in report["notes"]
    assert next(row for row in tables.rows(report) if row[0] == "wild")[1] == "3 of 5"


def test_other_tokens_are_compared_in_bits_per_byte(sweep, tmp_path):
    for seed, loss in enumerate(LOSSES):
        make_run(sweep / "bytes" / f"seed-{seed}", loss, seed, data__tokenizer="byte")
    assert report_of(sweep, tmp_path)["metric"]["name"] == "bits_per_byte"
    assert report_of(sweep, tmp_path, metric="train:loss")["metric"] == {
        "split": "train", "name": "loss", "higher_is_better": False}


def test_the_frontier_is_of_arms_that_none_beats_in_both(tmp_path):
    for seed in range(2):
        for name, loss, steps in (("cheap", 2.0, 10), ("good", 1.0, 20), ("bad", 1.5, 30)):
            folder = make_run(tmp_path / "s" / name / f"seed-{seed}", loss + seed / 100, seed, steps=steps)
            summary = json.loads((folder / "summary.json").read_text())
            (folder / "summary.json").write_text(json.dumps({**summary, "flops": steps * 1e6}))
    assert {arm["name"]: arm["frontier"]["flops"] for arm in report_of(tmp_path / "s", tmp_path)["arms"]} == {
        "bad": False, "cheap": True, "good": True}


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nowhere: no runs there"), ([], "give run directories or a sweep's folder"),
    (["{s}", "--baseline=bas"], "--baseline=bas: no such arm; did you mean base?"),
    (["{s}", "--metric=los"], "--metric=los: no run has it (valid/all); did you mean loss?"),
    (["{s}", "--test=pair"], "--test=pair: did you mean paired?"), (["{s}", "--correction=hol"], "did you mean holm?"),
    (["{s}", "--level=95"], "--level=95.0: give a share between 0 and 1"), (["{s}", "{s}/base"], "--out: of several folders"),
    (["{s}", "--assert-equal"], "--assert-equal: is of --compare"), (["--compare", "{s}", "{s}"], "no config.json there"),
])
def test_bad_input_is_one_line(args, message, sweep, capsys):
    assert main(["report", *(a.format(s=sweep) for a in args)]) == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1


def test_what_lies_inside_a_run_is_no_run(sweep, tmp_path):
    (sweep / "base/seed-0/huggingface").mkdir()
    (sweep / "base/seed-0/huggingface/config.json").write_text('{"model_type": "llama"}')
    assert len(read_runs([str(sweep)])) == 15


def test_the_same_seed_twice_is_no_second_observation(sweep, tmp_path):
    make_run(tmp_path / "again", 1.2)
    with pytest.raises(UserError, match="the same experiment with the same seed 0, which is no second observation"):
        analyse([str(sweep), str(tmp_path / "again")], str(tmp_path), str(tmp_path))


def test_equal_metrics_are_equal_whatever_the_speed(tmp_path, capsys):
    a, b = make_run(tmp_path / "a", 1.5), make_run(tmp_path / "b", 1.5)
    lines = (b / "metrics.jsonl").read_text()
    (b / "metrics.jsonl").write_text(lines.replace('"tokens_per_second": 100.0', '"tokens_per_second": 99.0'))
    assert main(["report", "--compare", str(a), str(b), "--assert-equal"]) == 0
    assert "metrics: equal bit for bit" in capsys.readouterr().out
    loss = 1.5 + 3 / 40
    (b / "metrics.jsonl").write_text(lines.replace(f'"loss": {loss!r}', f'"loss": {np.nextafter(loss, 2).item()!r}'))  # one bit
    assert main(["report", "--compare", str(a), str(b), "--assert-equal"]) == 2
    assert f"step 40, train: loss {loss!r} -> {np.nextafter(loss, 2).item()!r}" in capsys.readouterr().err
    (b / "metrics.jsonl").write_text("\n".join(lines.splitlines()[:-1]) + "\n")
    assert main(["report", "--compare", str(a), str(b), "--assert-equal"]) == 2
    assert "step 100, valid/all: only A has it" in capsys.readouterr().err


def test_two_runs_are_compared_with_what_differs(sweep, tmp_path, capsys):
    b = make_run(tmp_path / "b", LOSSES[0] + 0.001, seed=3, optimizer__name="muon")
    assert main(["report", "--compare", str(sweep / "base/seed-0"), str(b)]) == 0
    text = capsys.readouterr().out
    assert "optimizer.name: adamw -> muon" in text and "seed: 0 -> 3" in text and "data order differs (seed: 0 -> 3)" in text
    assert "valid/all loss: 1.504 -> 1.505 (+0.001)" in text and "metrics: step 10, train: loss" in text


def test_one_run_still_gets_its_own_page(tmp_path):
    run = make_run(tmp_path / "a", 1.5)
    for args in ([f"--workdir={run}"], [str(run)]):
        assert main(["report", *args]) == 0 and "<svg" in (run / "report.html").read_text()
        (run / "report.html").unlink()
