"""DPO, ORPO and SimPO against NumPy in float64, their gradients against finite differences, and runs of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_step import tiny

from jaxlm.cli import main
from jaxlm.config import load
from jaxlm.data.feed import put_everywhere
from jaxlm.errors import UserError
from jaxlm.objectives.build import build_objective
from jaxlm.objectives.preference import log_one_less_exp
from jaxlm.parallel.rules import replicated
from jaxlm.train.frozen import read_frozen
from jaxlm.train.state import build_model, flatten_paths, part_of, with_part
from jaxlm.train.step import build_program

VOCAB = 48
# Of each row its documents, (tokens, of which so many at the end are the answer): two pairs and padding, one pair that fills it.
ROWS = (((5, 2), (4, 1), (3, 2), (2, 1)), ((9, 4), (7, 6)))


def pair_batch(T=16, seed=0):
    rng = np.random.default_rng(seed)
    out = {name: np.zeros((len(ROWS), T), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    out["loss_mask"] = np.zeros((len(ROWS), T), np.float32)
    for row, documents in enumerate(ROWS):
        at = 0
        for segment, (length, answer) in enumerate(documents, 1):
            ids, span = rng.integers(0, VOCAB, length + 1), slice(at, at + length)
            out["tokens"][row, span], out["targets"][row, span], out["segment_ids"][row, span] = ids[:-1], ids[1:], segment
            out["positions"][row, span], out["loss_mask"][row, at + length - answer : at + length] = np.arange(length), 1
            at += length
    return out


def config_of(name, **changes):
    return tiny(objective__name=name, data__form="preference", **changes)


@jax.jit
def logits_of(module, batch):
    return module.logits(module.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[0])


class Models:
    """A model in training and its reference, their logits in float64."""

    def __init__(self, **changes):
        self.model = build_model(tiny(data__form="preference", **changes), VOCAB, "plain")
        self.params, self.other = (self.model.init(jax.random.key(seed)) for seed in (0, 1))
        self.batch = pair_batch()
        self.module = lambda params: nnx.merge(self.model.graph, params)

    def log_probs(self, params):
        """float64 (rows, T) of each target, from the model's logits."""
        logits = np.asarray(logits_of(self.module(params), self.batch), np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.take_along_axis(logits, self.batch["targets"][..., None], -1)[..., 0]

    def answers(self, params):
        """[(chosen, rejected)] of (sum of log-probabilities, tokens), by loops."""
        b, out, log_probs = self.batch, [], self.log_probs(params)
        for row in range(len(log_probs)):
            for k in range(len(ROWS[row]) // 2):
                marks = [(b["segment_ids"][row] == 2 * k + side) & (b["loss_mask"][row] > 0) for side in (1, 2)]
                out.append([(log_probs[row][mark].sum(), mark.sum()) for mark in marks])
        return np.array(out)


@pytest.fixture(scope="module")
def models():
    return Models()


sigmoid = lambda x: 1 / (1 + np.exp(-x))


def expected(name, policy, reference, o):
    """-> (loss, margin) of each pair, as the papers write them."""
    mean = policy[..., 0] / policy[..., 1]
    if name == "dpo":
        reward = o.beta * (policy[..., 0] - reference[..., 0]) / (policy[..., 1] if o.length_normalized else 1)
        h = reward[:, 0] - reward[:, 1]
        return -(1 - o.label_smoothing) * np.log(sigmoid(h)) - o.label_smoothing * np.log(sigmoid(-h)), h
    if name == "orpo":
        p = np.exp(mean)
        h = np.log((p / (1 - p))[:, 0] / (p / (1 - p))[:, 1])
        return -mean[:, 0] - o.beta * np.log(sigmoid(h)), h
    h = o.beta * (mean[:, 0] - mean[:, 1])
    return -np.log(sigmoid(h - o.margin)), h


CASES = [("dpo", {}), ("dpo", dict(objective__beta=2.0, objective__label_smoothing=0.2, objective__length_normalized=True)),
         ("dpo", dict(kernels__loss="chunked")), ("orpo", {}), ("simpo", dict(objective__beta=2.0, objective__margin=0.7))]


@pytest.mark.parametrize("name,changes", CASES)
def test_losses_equal_numpy_in_float64(models, name, changes):
    c = config_of(name, **changes)
    frozen = {"frozen": models.module(models.other)} if name == "dpo" else {}
    loss, weight, aux = jax.jit(build_objective(c))(models.module(models.params), models.batch, **frozen)
    losses, margins = expected(name, models.answers(models.params), models.answers(models.other), c.objective)
    assert weight == len(losses) == aux["examples"] == 3
    np.testing.assert_allclose([loss, aux["nll"], aux["reward_margin"]], [losses.sum(), losses.sum(), margins.sum()], rtol=2e-5)
    assert aux["correct"] == (margins > 0).sum()


@pytest.mark.parametrize("name,changes", CASES)
def test_gradients_equal_finite_differences(models, name, changes):
    """Of the loss as NumPy tells it in float64, along the gradient and along a random direction."""
    c = config_of(name, **changes)
    objective = build_objective(c)
    frozen = {"frozen": models.module(models.other)} if name == "dpo" else {}
    grads = jax.jit(jax.grad(lambda p: objective(models.module(p), models.batch, **frozen)[0]))(models.params)
    reference = models.answers(models.other)
    loss = lambda params: expected(name, models.answers(params), reference, c.objective)[0].sum()
    norm = float(np.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))))
    step = 1e-2 / norm
    ahead, back = (loss(jax.tree.map(lambda p, g, s=s: p + s * step * g, models.params, grads)) for s in (1, -1))
    np.testing.assert_allclose((ahead - back) / (2 * step), norm**2, rtol=5e-3)


def test_the_odds_are_exact_near_both_ends():
    for x in (-1e-6, -1e-3, -0.69, -0.7, -5.0, -15.0):
        exact = np.float64(np.float32(x))
        wanted = np.log(-np.expm1(exact)) if x > -1 else np.log1p(-np.exp(exact))
        np.testing.assert_allclose(log_one_less_exp(jnp.float32(x)), wanted, rtol=1e-5)
        np.testing.assert_allclose(jax.grad(log_one_less_exp)(jnp.float32(x)), -1 / np.expm1(-exact), rtol=1e-5)
    assert np.isfinite(jax.grad(log_one_less_exp)(0.0))


def test_nothing_beside_the_answers_and_no_other_pair_has_a_part(models):
    """The gradient of a row's loss in the embeddings of another row's tokens is zero; a prompt counts as context alone."""
    objective = jax.jit(build_objective(config_of("orpo")))
    batch = dict(models.batch)
    alone = {name: a[:1] for name, a in batch.items()}, {name: a[1:] for name, a in batch.items()}
    sums = [objective(models.module(models.params), b) for b in (batch, *alone)]
    np.testing.assert_allclose(sums[0][0], sums[1][0] + sums[2][0], rtol=1e-5)
    half = dict(batch, loss_mask=np.where(batch["segment_ids"] == 2, 0, batch["loss_mask"]))  # a pair without a rejected answer
    assert objective(models.module(models.params), half)[1] == 1


@pytest.mark.parametrize("changes", [
    dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, grad_accum_steps=2),
    pytest.param(dict(mesh__fsdp=2, mesh__context=4), marks=pytest.mark.slow),
    pytest.param(dict(mesh__stage=2, mesh__fsdp=4, model__scan_layers=True), marks=pytest.mark.slow)])
def test_mesh_and_accumulation_change_nothing(changes):
    def losses(c):
        program = build_program(c, VOCAB)
        init = jax.jit(program.init, out_shardings=program.shardings)
        state, own = init(3), jax.jit(lambda: program.init(4)["params"], out_shardings=program.shardings["params"])()
        step, _ = program.compile()
        rows = [pair_batch(seed=seed) for seed in range(4)]
        batch = program.feed.put({name: np.concatenate([b[name] for b in rows]) for name in rows[0]})
        hyper, out = put_everywhere(program.hyper, replicated(program.mesh)), []
        for _ in range(3):
            state, metrics = step(state, batch, hyper, own)
            out.append([float(metrics[name]) for name in ("loss", "grad_norm", "reward_margin")])
        return out

    wanted = losses(config_of("dpo", objective__beta=1.0))
    assert abs(wanted[0][2]) > 0.01 and wanted[2][0] != wanted[0][0]
    np.testing.assert_allclose(losses(config_of("dpo", objective__beta=1.0, **changes)), wanted, rtol=1e-4)


# ---- Runs --------------------------------------------------------------------------------------------------------------------

WORDS = "red green blue white black one two three four five".split()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with preferences for short answers, and a run that knows how conversations look."""
    folder = tmp_path_factory.mktemp("preferences")
    rng = np.random.default_rng(0)
    word = lambda: str(rng.choice(WORDS))
    pairs = [{"prompt": word(), "chosen": word(), "rejected": f"{word()} {word()}"} for _ in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    turns = [{"instruction": p["prompt"], "output": p["rejected"]} for p in pairs]
    (folder / "chat.jsonl").write_text("".join(json.dumps(t) + "\n" for t in turns))
    train(folder, "sft", "--config.data.form=chat", f"--config.data.path={folder}/chat.jsonl", "--config.data.tokenizer=bpe",
          "--config.data.bpe_vocab_size=300", "--config.steps=4")
    return folder


def options(folder, *more):
    return ["--config=configs/default.py", f"--config.data.store_dir={folder}/stores", "--config.model.num_layers=1",
            "--config.model.embed_dim=32", "--config.model.num_heads=2", "--config.seq_len=64", "--config.batch_size=4",
            "--config.observe.report=False", "--config.observe.progress=none", "--config.mesh.data=1", "--config.mesh.fsdp=1",
            "--config.schedule.warmup_steps=1", *more]


def train(folder, name, *more, code=0):
    assert main(["train", *options(folder, *more), f"--workdir={folder}/{name}"]) == code
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()] if not code else None


def preferring(folder, *more):
    return ["--config.data.form=preference", f"--config.data.path={folder}/pairs.jsonl", "--config.steps=6",
            "--config.optimizer.learning_rate=1e-2", "--config.observe.log_every=1", *more]


@pytest.mark.parametrize("changes", [["--config.optimizer.ema_decay=0.5"],
                                     ["--config.optimizer.learning_rate=0.1", "--config.model.lora_rank=2"]])
def test_dpo_starts_at_log_2_with_no_margin_and_comes_to_prefer(begun, changes, capsys):
    name = "dpo" + str(len(changes))
    start = f"--config.model.from_pretrained={begun}/sft"
    lines = train(begun, name, *preferring(begun, "--config.objective.name=dpo", start, *changes))
    first, valid = lines[0], lines[-1]
    np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
    assert first["reward_margin"] == 0
    assert lines[-2]["loss"] < 0.69 and lines[-2]["reward_margin"] > 0
    assert valid["split"] == "valid/all" and valid["accuracy"] > 0.5 and not {"bits_per_byte", "perplexity"} & set(valid)
    # Opened again, `eval` reads the same reference.
    capsys.readouterr()
    assert main(["eval", f"--workdir={begun}/{name}", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose([again["loss"], again["reward_margin"]], [valid["loss"], valid["reward_margin"]], rtol=1e-5)
    saved = json.loads((begun / name / "checkpoints" / "6" / "meta" / "metadata").read_text())["leaves"]
    assert not any("frozen" in path for path in saved)


def test_a_stopped_run_goes_on_bit_for_bit_and_minds_its_reference(begun, tmp_path, capsys):
    import shutil

    shutil.copytree(begun / "sft", tmp_path / "sft")
    common = preferring(begun, "--config.objective.name=dpo", f"--config.model.from_pretrained={tmp_path}/sft",
                        "--config.checkpoint.every_steps=3", "--config.checkpoint.keep=9")
    whole = train(begun, "whole", *common)
    shutil.copytree(begun / "whole", begun / "stopped")
    shutil.rmtree(begun / "stopped" / "checkpoints" / "6")
    (begun / "stopped" / "summary.json").unlink()
    shutil.copytree(begun / "stopped", begun / "misled")
    again = train(begun, "stopped", *common)
    assert [x["loss"] for x in again] == [x["loss"] for x in whole]
    assert main(["train", *options(begun, *preferring(begun, f"--config.data.path={begun}/chat.jsonl", "--config.data.form=chat",
                                                      f"--config.model.from_pretrained={begun}/sft")),
                 f"--workdir={tmp_path}/other"]) == 0
    shutil.rmtree(tmp_path / "sft" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "sft" / "checkpoints")
    train(begun, "misled", *common, code=2)
    assert "no longer what it was" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["orpo", "simpo"])
def test_the_others_need_no_reference(begun, name):
    lines = train(begun, name, *preferring(begun, f"--config.objective.name={name}", "--config.data.tokenizer=byte"))
    assert lines[-2]["loss"] < lines[0]["loss"] and lines[-2]["reward_margin"] > lines[0]["reward_margin"]


@pytest.mark.parametrize("lora", [0, 2])
def test_the_reference_is_what_trains_as_it_began(begun, lora):
    """With adapters a copy of these alone, trained ones of the run before included."""
    c = load("configs/default.py", options(begun, *preferring(
        begun, "--config.objective.name=dpo", f"--config.model.from_pretrained={begun}/sft",
        f"--config.model.lora_rank={lora}"))[1:])
    program = build_program(c, 300)
    (own,) = read_frozen(program, c)
    assert all(("lora" in path) == bool(lora) for path in flatten_paths(own))
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), own) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), program.inputs[3])
    params = jax.jit(program.init)(5)["params"]
    module = program.frozen.module(params, own)
    found = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, found, with_part(params, own))
    jax.tree.map(np.testing.assert_array_equal, part_of(found, own), own)


def test_what_does_not_fit_together_is_said(begun):
    for given, said in ((["--config.objective.name=dpo"], "model.from_pretrained"),
                        (["--config.objective.name=orpo", "--config.data.form=chat"], "needs 'preference'"),
                        (["--config.objective.name=next_token"], "needs one of dpo, orpo, simpo"),
                        (["--config.objective.name=simpo", "--config.objective.beta=0.0"], "above 0"),
                        (["--config.objective.name=orpo", "--config.model.family=encoder"], "needs decoder")):
        with pytest.raises(UserError) as error:
            load("configs/default.py", options(begun, *preferring(begun, *given))[1:])
        assert said in " ".join(error.value.problems)
