"""Stages: each row is read once; every step is compiled ahead; tokens are counted; resuming across a border is bitwise."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from data_cases import write

from configs import default
from jaxlm.config import resolve, steps_of
from jaxlm.data.feed import put_everywhere
from jaxlm.data.inspect import inspect
from jaxlm.data.loader import build_data
from jaxlm.errors import UserError
from jaxlm.parallel.rules import replicated
from jaxlm.research.members import check_numbers
from jaxlm.research.prediction import tokens_of
from jaxlm.research.replay import replay
from jaxlm.research.scaling import fixed_ratio
from jaxlm.stages import Stage, stage_at, stages_of, tokens_before
from jaxlm.train import loop
from jaxlm.train.bench import bench
from jaxlm.train.step import Program, build_programs
from jaxlm.validation import validate

STAGES = ((3, {"batch_size": 2, "seq_len": 4}), (5, {"batch_size": 2}))  # of 8 steps of 4 x 8


@pytest.fixture
def staged(config):
    """On 400 different characters a row of which is known by its first."""
    write(config, "a.txt", "".join(chr(0x4E00 + i) for i in range(400)))
    config.steps, config.stages = 8, STAGES
    return config


def test_stages_follow_one_another_and_end_with_the_runs_own(staged):
    stages = stages_of(staged)
    assert stages == (Stage(0, 3, 2, 4, 0, 2), Stage(3, 5, 2, 8, 4), Stage(5, 8, 4, 8, 8))
    assert [stage_at(stages, step).end for step in range(8)] == [3, 3, 3, 5, 5, 8, 8, 8]
    assert [tokens_before(stages, step) for step in (0, 1, 3, 4, 8)] == [0, 8, 24, 40, 24 + 32 + 96]
    staged.stages = (("24 tokens", {"batch_size": 2, "seq_len": 4}), ("56 tokens", {"batch_size": 2}))  # from the run's start
    assert stages_of(staged) == stages
    staged.stages = ("37.5%", {"batch_size": 2, "seq_len": 4}), ("62.5%", {"batch_size": 2})
    assert stages_of(staged) == stages
    staged.stages = ()
    assert stages_of(staged) == (Stage(0, 8, 4, 8),)


@pytest.mark.parametrize("stages, message", [
    ((("50%", {"batch_sise": 2}),), "stages: until 50%: unknown key 'batch_sise'; did you mean batch_size?"),
    (((8, {"batch_size": 2}),), "stages: until 8 is step 8: must come after step 0, where the stage begins, and before the"),
    (((9, {"batch_size": 2}),), "stages: until 9 is step 9"),
    (((4, {"batch_size": 2, "seq_len": 4}), (4, {"batch_size": 2})), "stages: until 4 is step 4: must come after step 4"),
    (((4, {"batch_size": 2, "seq_len": 4}), (2, {"batch_size": 2})), "stages: until 2 is step 2: must come after step 4"),
    (((4, {"batch_size": 3}),), "stages: until 4: batch_size=3 is not divisible by grad_accum_steps=2"),
    (((4, {"seq_len": 3}),), "stages: until 4: seq_len=3 does not divide the run's seq_len=8; use 2"),
    (((4, {"batch_size": 8}),), "stages: until 4: 64 tokens a step are more than the run's own 32"),
    (((4, {"batch_size": 4}),), "stages: until 4: has the run's own batch_size=4 and seq_len=8"),
    (((4, {"batch_size": 0}),), "must be whole numbers of at least 1"),
    (((4, {"seq_len": "4"}),), "must be whole numbers of at least 1"),
    ((4, {"batch_size": 2}), "stages: 4 is not a stage; give (until, what differs), such as ('10%', {'batch_size': 4})"),
    ((("4 days", {"batch_size": 2}),), "stages='4 days': give a number of steps"),
])
def test_what_cannot_be_is_one_line(stages, message, staged):
    staged.stages, staged.grad_accum_steps = stages, 2
    with pytest.raises(UserError) as error:
        validate(staged)
    assert len(error.value.problems) == 1 and message in error.value.problems[0]


def test_durations_in_tokens_and_rows_that_stay_whole_are_refused(staged):
    staged.eval.every_steps = "64 tokens"
    with pytest.raises(UserError, match="eval.every_steps='64 tokens': with stages, steps differ in tokens; give steps"):
        validate(staged)
    staged.eval.every_steps, staged.data.packing = 4, "best_fit"
    with pytest.raises(UserError, match="stages: seq_len: rows of data.packing=best_fit, data.form=text are not cut up"):
        validate(staged)
    staged.stages = ((3, {"batch_size": 2}),)
    validate(staged)
    staged.stages = ()
    assert steps_of("64 tokens", staged, "eval.every_steps") == 2


@pytest.mark.parametrize("jitter", [False, True])
def test_each_row_is_read_once_in_the_runs_order(staged, jitter):
    staged.data.jitter = jitter
    batches = [build_data(staged).train.batch(step) for step in range(8)]
    assert [batch["tokens"].shape for batch in batches] == [(2, 4)] * 3 + [(2, 8)] * 2 + [(4, 8)] * 3
    staged.stages = ()
    plain = build_data(staged).train
    rows = plain.rows_at(list(range(20)))
    for name in ("tokens", "targets"):
        # Two rows in two pieces; of the next two only the first piece: the stage has ended. Then whole rows.
        np.testing.assert_array_equal(np.hstack([batches[0][name], batches[1][name]]), rows[name][:2])
        np.testing.assert_array_equal(batches[2][name], rows[name][2:4, :4])
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in batches[3:]]), rows[name][4:20])
    assert batches[1]["positions"].tolist() == [[0, 1, 2, 3]] * 2  # a piece is a row


def test_a_mixture_shares_out_the_rows_that_are_read(staged):
    write(staged, "b.txt", "".join(chr(0x7000 + i) for i in range(400)))
    staged.data.mixture = (("a", "a.txt", 0.5), ("b", "b.txt", 0.5))
    staged.data.mixture_stages = ((5, {"b": 1.0}),)
    train = build_data(staged).train
    assert train.mix.firsts == [0, 8] and sum(train.mix.had) == 20
    first, second = train.batch(0), train.batch(1)
    np.testing.assert_array_equal(first["targets"][:, -1], second["tokens"][:, 0])  # the next piece of the same rows


def test_what_has_one_step_for_the_whole_run_refuses_stages(staged):
    with pytest.raises(UserError, match="stages: members of an ensemble have one step"):
        check_numbers({}, staged)
    staged.model.vocab_size = 400
    with pytest.raises(UserError, match="stages: a scaling law's steps"):
        list(fixed_ratio(staged, (1e4,), (1,)))
    with pytest.raises(UserError, match="stages: a scaling law's steps"):
        tokens_of(staged, 8)


# ---- Runs ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """-> (config, workdir, programs compiled before each step): a whole run with a checkpoint at every step."""
    root = tmp_path_factory.mktemp("staged")
    (root / "a.txt").write_text("".join(chr(97 + i * i % 23) for i in range(800)))
    c = default.get_config()
    c.data.store_dir, c.data.root, c.data.path, c.data.jitter = str(root / "stores"), str(root), "a.txt", True
    c.steps, c.batch_size, c.seq_len, c.stages, c.mesh.data = 8, 4, 8, STAGES, 2
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.dropout = 1, 8, 1, 0.1
    c.model.position = "learned"  # of the run's own length, whatever the stage
    c.checkpoint.every_steps, c.checkpoint.keep, c.eval.every_steps, c.observe.log_every = 1, 10, 0, 1
    c.observe.report, c.observe.progress, c.schedule.warmup_steps = False, "none", 2
    resolve(c)
    validate(c)
    compiled, counts = [], []
    count = lambda name, *args, **more: compiled.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(count)
    asked = loop.stage_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stage_at", lambda stages, step: counts.append(len(compiled)) or asked(stages, step))
        loop.train(c, str(root / "run"))
    jax.monitoring.unregister_event_duration_listener(count)
    return c, root / "run", counts


def lines_of(workdir) -> list[dict]:
    lines = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return [{k: x[k] for k in ("split", "step", "tokens", "loss", "grad_norm", "learning_rate") if k in x} for x in lines]


def state_at(workdir, step: int) -> list:
    import orbax.checkpoint as ocp

    return jax.tree.leaves(ocp.PyTreeCheckpointer().restore(pathlib.Path(workdir, "checkpoints", str(step), "state").absolute()))


def test_tokens_and_flops_are_those_of_the_stages(run):
    config, workdir, _ = run
    assert [x["tokens"] for x in lines_of(workdir) if x["split"] == "train"] == [8, 16, 24, 40, 56, 88, 120, 152]
    summary = json.loads((workdir / "summary.json").read_text())
    programs = build_programs(config, build_data(config).vocab_size)
    costs = [loop.cost_of(stage.view(config), program).causal_flops for stage, program in programs.items()]
    assert summary["tokens"] == 152 and costs[0] < costs[1] == costs[2]
    assert summary["flops"] == 24 * costs[0] + 128 * costs[1]


def test_the_loop_compiles_no_step(run, monkeypatch, tmp_path):
    config, _, counts = run
    # Asked about steps 1, 2, ...: between the second and the last, saves included, no program is made.
    assert len(counts) > 12 and len(set(counts[3:-2])) == 1
    made = []
    compile_one = Program.compile
    monkeypatch.setattr(Program, "compile", lambda program: made.append(program.feed.shape) or compile_one(program))
    config = config.copy_and_resolve_references()
    config.steps, config.checkpoint.every_steps = 6, 0
    loop.train(config, str(tmp_path / "short"))
    assert made == [(2, 4), (2, 8), (4, 8)]  # once each


def test_it_is_what_the_stages_steps_make_by_hand(run):
    config, workdir, _ = run
    data = build_data(config)
    programs = build_programs(config, data.vocab_size)
    *_, program = programs.values()
    state = jax.jit(program.init, out_shardings=program.shardings)(config.seed)
    hyper, step = put_everywhere(program.hyper, replicated(program.mesh)), 0
    for shape, steps in (((2, 4), 3), ((2, 8), 2), ((4, 8), 3)):
        (program,) = [p for p in programs.values() if p.feed.shape == shape]
        step_fn, _ = program.compile()
        for _ in range(steps):
            state, _ = step_fn(state, program.feed.put(data.train.batch(step)), hyper)
            step += 1
    for a, b in zip(jax.tree.leaves(state), state_at(workdir, 8), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("step", [2, 3])  # inside a stage, at a border
def test_resuming_is_bitwise(run, tmp_path, step):
    config, workdir, _ = run
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    (again / "summary.json").unlink()
    for later in range(step + 1, 9):
        shutil.rmtree(again / "checkpoints" / str(later))
    loop.train(config, str(again))
    assert lines_of(again) == lines_of(workdir)
    for a, b in zip(state_at(again, 8), state_at(workdir, 8), strict=True):
        np.testing.assert_array_equal(a, b)
    flops = [json.loads((folder / "summary.json").read_text())["flops"] for folder in (again, workdir)]
    assert flops[0] == flops[1]


def test_what_a_step_saw_and_did_can_be_looked_at(run):
    config, workdir, _ = run
    seen = inspect(str(workdir), "", 2, 0)
    assert seen["batch_size"] == 2 and [len(row["tokens"]) for row in seen["rows"]] == [4, 4]
    first = inspect(str(workdir), "", 1, 0)
    assert [row["index"] for row in seen["rows"]] == [row["index"] + 1 for row in first["rows"]]  # the piece after
    assert "the same bit for bit" in replay(str(workdir), 4)["verdict"]


def test_a_mesh_that_does_not_divide_a_stage_is_told(run):
    config = run[0].copy_and_resolve_references()
    config.mesh.data = 4
    with pytest.raises(UserError, match=r"stages: until step 3: batch_size / grad_accum_steps=2 is not divisible by mesh"):
        build_programs(config, 23)


def test_bench_times_the_runs_own_batch(run, monkeypatch):
    monkeypatch.setattr("jaxlm.train.bench.matmul_flops", lambda devices: 1.0)
    assert bench(run[0], warmup=1, blocks=1, block_steps=1)["tokens"] == 32
