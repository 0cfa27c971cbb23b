"""The distillation loss against NumPy in float64, its gradient, and runs with a teacher of another width."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from hf_models import golden
from test_preference import options, pair_batch, train
from test_step import tiny

from jaxlm.cli import main
from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.objectives.build import build_objective
from jaxlm.train.frozen import read_frozen
from jaxlm.train.state import build_model
from jaxlm.train.step import build_program

VOCAB = 48


def config_of(**changes):
    return tiny(objective__name="distillation", data__isolate_documents=True, **changes)


@pytest.fixture(scope="module")
def pair():
    """-> (student, its parameters, module of the teacher), whose softcap and width are others."""
    student, teacher = build_model(config_of(), VOCAB, "plain"), build_model(
        config_of(model__embed_dim=48, model__num_layers=1, model__final_softcap=3.0), VOCAB, "plain")
    of_teacher = teacher.init(jax.random.key(1))
    of_teacher["embedding"] = 5 * of_teacher["embedding"]  # an opinion
    return student, student.init(jax.random.key(0)), nnx.merge(teacher.graph, of_teacher)


def log_softmax(a):
    a = a - a.max(-1, keepdims=True)
    return a - np.log(np.exp(a).sum(-1, keepdims=True))


@jax.jit
def logits_of(module, batch):
    return module.logits(module.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])[0])


def expected(module, teacher, batch, o):
    """-> (loss, cross-entropy, KL), sums in float64."""
    logits, of_teacher = (np.asarray(logits_of(m, batch), np.float64) for m in (module, teacher))
    mask, t = batch["loss_mask"], o.temperature
    nll = -(np.take_along_axis(log_softmax(logits), batch["targets"][..., None], -1)[..., 0] * mask).sum()
    p, q = log_softmax(of_teacher / t), log_softmax(logits / t)
    p, q = (q, p) if o.kl == "reverse" else (p, q)
    kl = ((np.exp(p) * (p - q)).sum(-1) * mask).sum()
    return (1 - o.teacher_weight) * nll + o.teacher_weight * t**2 * kl, nll, kl


CASES = [{}, dict(objective__kl="reverse", objective__temperature=2.0, objective__teacher_weight=0.9),
         dict(objective__temperature=3.0, objective__teacher_weight=1.0, kernels__loss="chunked")]


@pytest.mark.parametrize("changes", CASES)
def test_the_loss_equals_numpy_in_float64_and_its_gradient_finite_differences(pair, changes):
    student, params, teacher = pair
    c, batch = config_of(**changes), pair_batch()
    objective = jax.jit(build_objective(c))
    module = lambda p: nnx.merge(student.graph, p)
    loss, weight, aux = objective(module(params), batch, frozen=teacher)
    wanted = expected(module(params), teacher, batch, c.objective)
    np.testing.assert_allclose([loss, aux["nll"], aux["teacher_kl"]], wanted, rtol=2e-5)
    assert weight == batch["loss_mask"].sum()
    grads = jax.jit(jax.grad(lambda p: objective(module(p), batch, frozen=teacher)[0]))(params)
    norm = float(np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads))))
    step = 1e-2 / norm
    moved = (module(jax.tree.map(lambda p, g, s=s: p + s * step * g, params, grads)) for s in (1, -1))
    ahead, back = (expected(there, teacher, batch, c.objective)[0] for there in moved)
    np.testing.assert_allclose((ahead - back) / (2 * step), norm**2, rtol=5e-3)


def test_of_itself_there_is_nothing_to_learn(pair):
    student, params, _ = pair
    objective, module = jax.jit(build_objective(config_of(objective__teacher_weight=1.0))), nnx.merge(student.graph, params)
    loss, _, aux = objective(module, pair_batch(), frozen=module)
    assert abs(loss) < 1e-4 and abs(aux["teacher_kl"]) < 1e-4


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "text.txt").write_text("to be or not to be that is the question and more of it " * 80)
    data = [f"--config.data.path={folder}/text.txt", "--config.data.tokenizer=char"]
    train(folder, "teacher", *data, "--config.steps=30", "--config.model.embed_dim=48", "--config.optimizer.learning_rate=1e-2")
    return folder


def learning(folder, *more):
    return [f"--config.data.path={folder}/text.txt", "--config.objective.name=distillation", "--config.steps=6",
            f"--config.objective.teacher={folder}/teacher", "--config.optimizer.learning_rate=1e-2",
            "--config.observe.log_every=1", "--config.seq_len=32", *more]


def test_a_run_comes_closer_to_its_teacher_and_is_evaluated_with_it(taught, capsys):
    lines = train(taught, "student", *learning(taught, "--config.objective.teacher_weight=1.0"))
    valid = lines[-1]
    assert lines[-2]["teacher_kl"] < lines[0]["teacher_kl"] and valid["loss"] < lines[0]["loss"]
    stored = json.loads((taught / "student" / "config.json").read_text())["config"]
    assert stored["data"]["tokenizer"] == f"{taught}/teacher/tokenizer.json"
    capsys.readouterr()
    assert main(["eval", f"--workdir={taught}/student", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose([again["loss"], again["teacher_kl"]], [valid["loss"], valid["teacher_kl"]], rtol=1e-5)


def test_a_hugging_face_folder_teaches_on_a_mesh(taught):
    folder = golden("llama2")[0]
    c = load("configs/default.py", options(taught, *learning(
        taught, f"--config.objective.teacher={folder}", "--config.data.source=synthetic", "--config.model.vocab_size=99",
        "--config.mesh.fsdp=2"))[1:])
    teacher_size = build_size(folder)
    c.model.vocab_size = teacher_size
    program = build_program(c, teacher_size)
    (own,) = read_frozen(program, c)
    assert jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), own) == jax.tree.map(
        lambda a: (a.shape, a.dtype, a.sharding), program.inputs[3])
    with pytest.raises(UserError, match=f"has {teacher_size} words and the model here 99"):
        build_program(c, 99)


def build_size(folder):
    from jaxlm.huggingface.load import open_source

    return open_source(folder).config.model.vocab_size


def test_a_teacher_of_another_tokenizer_is_refused(taught):
    c = load("configs/default.py", options(taught, *learning(taught, "--config.data.tokenizer=byte"))[1:])
    with pytest.raises(UserError, match="its tokenizer is another than data.tokenizer=byte"):
        build_program(c, 257)
    for given, said in ((["--config.objective.teacher="], "goes with objective.name=distillation"),
                        (["--config.objective.kl=both"], "objective.kl"), (["--config.objective.temperature=0.0"], "above 0"),
                        (["--config.objective.teacher_weight=1.5"], "from 0 to 1")):
        with pytest.raises(UserError) as error:
            load("configs/default.py", options(taught, *learning(taught, *given))[1:])
        assert said in " ".join(error.value.problems)
