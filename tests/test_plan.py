"""`jaxlm plan`: the estimate against the compiler's stored answers, the compiler's answers read rightly, and the verb."""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from hf_models import golden
from plan_cases import CASES, PUBLISHED

from jaxlm import cli
from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.huggingface.load import open_source
from jaxlm.models.remat import POLICIES
from jaxlm.observe.throughput import flops_per_token
from jaxlm.plan import report
from jaxlm.plan.compiled import Compiled, OutOfMemory, compile_step
from jaxlm.plan.devices import find
from jaxlm.plan.estimate import estimate, network_seconds, sizes_of, work
from jaxlm.plan.facts import flops
from jaxlm.plan.hardware import CHIPS, bandwidth, chip_of, parse_topology
from jaxlm.plan.hlo import Program as Hlo
from jaxlm.plan.plan import FACTS, Plan, as_json, plan, time_of, what_would_fit
from jaxlm.plan.roofline import EXPOSED, roofline
from jaxlm.plan.search import REMATS, best_mesh, everything, search
from jaxlm.train.record import cost_of
from jaxlm.train.step import build_program

GOLDEN = pathlib.Path(__file__).parent / "golden" / "plans.json"


def config_of(name, *overrides):
    file, _, given = CASES[name]
    return load(file, [f"--config.{o}" for o in (*given, *overrides)])


@pytest.fixture
def no_libtpu(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest))


@pytest.fixture(scope="module")
def llama():
    """-> (config, sizes) of Llama 1B at T=4096, 64 rows."""
    config = config_of("1B v5e-16")
    return config, sizes_of(config, config.model.vocab_size)


# ---- The estimate -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_near_what_the_compiler_says(name, no_libtpu):
    """Memory within 10 %, FLOPs within 2 %: of real configs on TPUs, as libtpu compiled them."""
    config, stored = config_of(name), json.loads(GOLDEN.read_text())["plans"][name]
    found = plan(config, find(CASES[name][1]), sizes_of(config, config.model.vocab_size)).estimate
    assert found.peak == pytest.approx(stored["peak_bytes"], rel=0.10)
    assert found.flops == pytest.approx(stored["flops"], rel=0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", CASES)
def test_the_compiler_still_says_so(name):
    """One to three minutes each. JAXLM_UPDATE_GOLDEN=1 stores what it says."""
    config = config_of(name)
    compiled = plan(config, find(CASES[name][1]), sizes_of(config, config.model.vocab_size)).compiled
    found = {fact: getattr(compiled, fact) for fact in FACTS}
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("JAXLM_UPDATE_GOLDEN"):
        golden["plans"][name] = found
        golden["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu")}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    stored = golden["plans"][name]
    assert found["argument_bytes"] == stored["argument_bytes"] and found["flops"] == pytest.approx(stored["flops"], rel=1e-6)
    for fact in ("peak_bytes", "product_bytes", "other_bytes"):
        assert found[fact] == pytest.approx(stored[fact], rel=0.05), fact


@pytest.mark.parametrize("remat", ["none", "minimal", "save_dots", "save_attention", "full"])
@pytest.mark.parametrize("name", ["1B v5e-16", "124M v5e-8", "mixtral"])
def test_flops_are_those_of_the_traced_step(name, remat):
    """On one device, with attention that computes whole squares: at most 2 % apart."""
    options = [f"model.remat={remat}", "mesh.data=1", "mesh.fsdp=1", "kernels.attention=plain", "batch_size=4"]
    if name == "mixtral":  # routed experts have no names: whatever is kept, they are done again
        config = load("configs/mixtral_8x7b.py", [f"--config.{o}" for o in (*options, "kernels.grouped_matmul=ragged_dot")])
    else:
        config = config_of(name, *options)
    counted = flops(build_program(config, config.model.vocab_size, jax.devices()[:1]).jaxpr())
    assert work(config, sizes_of(config, config.model.vocab_size), whole_squares=True)[0] == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name, more", [("dpo", []), ("dpo", ["model.lora_rank=4"]), ("distillation", [])])
def test_a_frozen_model_is_counted_with_its_forward_pass_and_its_parameters(name, more):
    options = ["data.source=synthetic", "batch_size=4", "seq_len=128", "model.num_layers=2", "kernels.attention=plain",
               f"objective.name={name}", *more]
    if name == "distillation":
        options += [f"objective.teacher={golden('llama2')[0]}", "data.tokenizer=byte"]
    config = load("configs/default.py", [f"--config.{o}" for o in options])
    vocab_size = open_source(config.objective.teacher).config.model.vocab_size if config.objective.teacher else 300
    sizes, program = sizes_of(config, vocab_size), build_program(config, vocab_size, jax.devices()[:1])
    near = 0.03 if more else 0.02  # below its first adapter a frozen base needs no gradient, which counts
    assert work(config, sizes, whole_squares=True)[0] == pytest.approx(flops(program.jaxpr()), rel=near)
    memory = estimate(config, sizes, axes(), None).memory
    own = program.frozen_inputs[0]
    assert memory["frozen model"] == sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(own))
    if name == "dpo" and not more:  # the same shape: a forward pass is a third of a step
        alone = flops_per_token(config, program.model.num_matmul_parameters)
        assert cost_of(config, program)[:2] == tuple(of * 4 / 3 for of in alone)
        assert estimate(config, sizes, axes(fsdp=2), None).memory["frozen model"] < memory["frozen model"]


def test_parameters_and_optimizer_are_counted_as_they_lie(llama):
    """16 ways cut up: all but the norms, which are not."""
    config, sizes = llama
    memory = estimate(config, sizes, axes(fsdp=16), chip_of("TPU v5 lite")).memory
    norms = (2 * 16 + 1) * 2048
    assert memory["parameters"] == 4 * ((sizes.model.num_parameters - norms) / 16 + norms)
    assert memory["optimizer"] == 2 * memory["parameters"] + 8  # and two counters: the optimizer's, the state's
    whole = estimate(config, sizes, axes(data=16), chip_of("TPU v5 lite")).memory
    assert whole["parameters"] == 4 * sizes.model.num_parameters


@pytest.mark.parametrize("changes, part", [(["model.remat=minimal"], "activations"), (["batch_size=256"], "activations")])
def test_what_holds_more_is_said_to_hold_more(llama, changes, part):
    config, sizes = llama
    more, chip = config_of("1B v5e-16", *changes), chip_of("TPU v5 lite")
    before, after = (estimate(c, sizes, axes(fsdp=16), chip) for c in (config, more))
    assert after.memory[part] > before.memory[part] and after.peak > before.peak


def test_offload_trades_device_memory_for_the_way_to_the_host(llama):
    config, sizes = llama
    chip = chip_of("TPU v5 lite")
    kept, sent = (estimate(config_of("1B v5e-16", f"model.remat={remat}"), sizes, axes(fsdp=16), chip)
                  for remat in ("minimal", "offload"))
    assert sent.peak < kept.peak and sent.flops == kept.flops and sent.host_bytes > 0 == kept.host_bytes


def test_traffic_is_that_of_rings(llama):
    config, sizes = llama
    network = lambda **a: estimate(config, sizes, axes(**a), chip_of("TPU v5 lite")).network
    P = sizes.model.num_parameters
    assert network(data=16) == {"all-reduce data": 2 * 15 / 16 * P * 4}
    assert set(network(fsdp=8, tensor=2)) == {"all-gather fsdp", "all-reduce fsdp", "all-gather tensor", "reduce-scatter tensor"}
    assert not network()


def axes(**sizes):
    return {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1, "stage": 1} | sizes


# ---- The roofline -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flops_, bytes_, seconds, host, limited_by", [
    (1e15, 1e9, 0.1, 0, "compute"), (1e12, 1e12, 0.1, 0, "memory"), (1e12, 1e9, 2.0, 0, "network"),
    (1e12, 1e9, 0.1, 1e12, "host")])
def test_the_longest_part_limits(flops_, bytes_, seconds, host, limited_by):
    chip = chip_of("TPU v5 lite")
    found = roofline(chip, flops_, bytes_, bytes_, seconds, host)
    parts = {"compute": flops_ / chip.peak_flops / chip.matmul_share, "network": seconds, "host": host / chip.host_bandwidth}
    local = max(parts["compute"], bytes_ / chip.memory_bandwidth) + bytes_ / chip.memory_bandwidth
    everything = (local, parts["network"], parts["host"])
    assert found.limited_by == limited_by
    assert found.step == pytest.approx(max(everything) + EXPOSED * (sum(everything) - max(everything)))


def test_rings_are_as_fast_as_their_links():
    v5p, h200 = (next(c for c in CHIPS if c.name == name) for name in ("v5p", "h200"))
    assert bandwidth(v5p, 4, 64) == 180e9 and bandwidth(v5p, 64, 64) == 3 * 180e9  # along one side of 4x4x4; over all three
    seconds = lambda chip, name, axes, slices=1, *options: network_seconds(config_of("8B v5p-128", *options), {name: 1e9}, axes,
                                                                           chip, slices)
    # Two slices: each device sends its 64th of the 127 parts that go round over the slow network, the rest in its slice.
    both = seconds(v5p, "all-gather fsdp", axes(fsdp=128), 2, "mesh.dcn_fsdp=2", "mesh.fsdp=128")
    assert both == pytest.approx(1e9 / 127 / v5p.slow_bandwidth + 1e9 / (3 * 180e9))
    # Nodes of 8: tensor stays in one, data is all between them, fsdp=16 is both.
    assert seconds(h200, "all-gather tensor", axes(data=2, tensor=8)) == pytest.approx(1e9 / 450e9)
    assert seconds(h200, "all-reduce data", axes(data=2, tensor=8)) == pytest.approx(1e9 / 50e9)
    assert seconds(h200, "all-gather fsdp", axes(fsdp=16)) == pytest.approx(1e9 / 15 / 50e9 + 1e9 / 450e9)


# ---- Reading the compiler's answer ------------------------------------------------------------------------------------------


HLO = """HloModule step
%inside (p.0: bf16[16,64,8]) -> bf16[64,8] {
  %p.0 = bf16[16,64,8]{2,1,0} parameter(0)
  %i = s32[] constant(3)
  %slice = bf16[1,64,8]{2,1,0} dynamic-slice(%p.0, %i, %i, %i), dynamic_slice_sizes={1,64,8}
  ROOT %b = bf16[64,8]{1,0} bitcast(%slice)
}
%multiplies (p.1: bf16[64,8], p.2: bf16[8,4]) -> bf16[64,4] {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %p.2 = bf16[8,4]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,4]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%condition (c: (s32[], bf16[16,64,8])) -> pred[] {
  %c = (s32[], bf16[16,64,8]{2,1,0}) parameter(0)
  %n = s32[] constant(16)
  %k = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%k, %n), direction=LT
}
%body (s: (s32[], bf16[16,64,8])) -> (s32[], bf16[16,64,8]) {
  %s = (s32[], bf16[16,64,8]{2,1,0}) parameter(0)
  %layers = bf16[16,64,8]{2,1,0} get-tuple-element(%s), index=1
  %fusion.1 = bf16[64,8]{1,0} fusion(%layers), kind=kLoop, calls=%inside
  %near = bf16[8,4]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %fusion.2 = bf16[64,4]{1,0} fusion(%fusion.1, %near), kind=kOutput, calls=%multiplies
  ROOT %t = (s32[], bf16[16,64,8]{2,1,0}) tuple(%k2, %layers)
}
ENTRY %main (a: bf16[16,64,8]) -> f32[256] {
  %a = bf16[16,64,8]{2,1,0} parameter(0)
  %start = (s32[], bf16[16,64,8]{2,1,0}) tuple(%zero, %a)
  %while.1 = (s32[], bf16[16,64,8]{2,1,0}) while(%start), condition=%condition, body=%body
  %e = f32[256]{0} iota(), iota_dimension=0
  ROOT %copy.1 = f32[256]{0} copy(%e)
}
"""


def test_bytes_are_counted_by_hand():
    """A loop of 16 turns; a slice of a stack, not the stack; nothing for what lies in another memory."""
    program = Hlo(HLO)
    moved = {o.name: (program.moved(c, o), times) for c, o, times, _ in program.walk() if program.moved(c, o)}
    assert moved == {"fusion.1": (2 * 64 * 8 + 2 * 64 * 8, 16), "fusion.2": (2 * 64 * 8 + 2 * 64 * 4, 16), "copy.1": (2048, 1)}
    found = {o.name: program.has_product(o) for _, o, _, _ in program.walk()}
    assert found["fusion.2"] and not found["fusion.1"] and not found["copy.1"]


def test_a_refusal_of_the_compiler_says_how_much():
    class Program:
        state = {}

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
                                             "temporaries (31.76G) exceeds available HBM (15.75G).")

    with pytest.raises(OutOfMemory) as refusal:
        compile_step(Program(), 0)
    assert refusal.value.needed == 31.76 * 2**30 and refusal.value.limit == 15.75 * 2**30


@pytest.mark.parametrize("peak", [2**32, 2**33])  # less than the estimate says, and more
def test_parts_of_the_memory_add_up_to_what_the_compiler_says(llama, peak):
    config, sizes = llama
    target, guess = find("h100x8"), estimate(config, sizes, axes(fsdp=16), chip_of("TPU v5 lite"))
    compiled = Compiled(peak, 0, 1.0, 1, 1, {}, 1.0)
    memory = Plan(config, target, axes(fsdp=16), "cudnn", guess, compiled, None, target.limit, None).memory
    assert sum(memory.values()) == pytest.approx(peak) and memory["parameters"] == guess.memory["parameters"]
    assert (memory["temporaries"] > 0) == (peak > guess.peak)


# ---- Topologies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, parsed", [("v5p:4x4x4", "v5p 4x4x4"), ("v5e-16", "v5e 4x4"), ("v6e-256", "v6e 16x16"),
                                          ("v5p-128", "v5p 4x4x4"), ("v5p-256", "v5p 4x4x8"), ("v4-8", "v4 1x2x2")])
def test_names_of_topologies(text, parsed):
    assert parse_topology(text) == tuple(parsed.split())


@pytest.mark.parametrize("name, hint", [("v5p-127", "use v5p-64 or v5p-128"), ("v6e-24", "use v6e-16 or v6e-32"),
                                        ("h100x", "did you mean h100x8"), ("h200x12", "use h200x8 or h200x16"),
                                        ("tpu", "v5p:4x4x4")])
def test_an_unknown_topology_is_one_line_with_those_near(name, hint):
    with pytest.raises(UserError, match=re.escape(hint)):
        find(name)


# ---- What is said of it in public -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_planned_speeds_of_published_runs(name, no_libtpu):
    """Within 12 points of the published MFU; and docs/plan.md says what is planned."""
    topology, slices, options, mfu, speed = PUBLISHED[name]
    config, target = load("configs/llama3_8b.py", [f"--config.{o}" for o in options]), find(topology, slices)
    found = plan(config, target, sizes_of(config, config.model.vocab_size))
    assert mfu is None or abs(100 * found.mfu - mfu) < 12
    published = f"{mfu} % ({speed:,})" if mfu else f"({speed:,})"
    line = f"| {name} | {published} | {100 * found.mfu:.1f} % ({found.tokens_per_second / target.count:,.0f}) |"
    assert line in pathlib.Path("docs/plan.md").read_text(), line


@pytest.mark.parametrize("name, maxtext", [("1B v5e-16", 10.51), ("1B v5e-16 save_attention", None), ("8B v5p-128", 14.54),
                                           ("70B v5p-256", 27.13), ("70B v5p-256 accumulation", 27.13)])
def test_the_readmes_table_is_that_of_the_stored_plans(name, maxtext, no_libtpu):
    config, target = config_of(name), find(CASES[name][1])
    compiled = Compiled(**json.loads(GOLDEN.read_text())["plans"][name])
    found = plan(config, target, sizes_of(config, config.model.vocab_size))._replace(compiled=compiled)
    found = found._replace(roofline=time_of(config, target, found.axes, found.estimate, compiled))
    ratio = f"{found.peak / 2**30 / maxtext:.2f}x of {maxtext}" if maxtext else "lighter policies ask for 22-24 and fail"
    line = (f"| {found.peak / 2**30:.2f} GiB | {ratio} | {found.limit / 2**30:.2f} | {found.roofline.step:.3g} s, MFU "
            f"{found.mfu:.0%}, {found.roofline.limited_by} |")
    assert line in pathlib.Path("README.md").read_text(), line


# ---- Search, advice -----------------------------------------------------------------------------------------------------------


def test_search_finds_what_fits_and_is_fastest(llama):
    config, sizes = llama
    target = find("h100x8")
    found = everything(config, target, sizes)
    assert all(c.peak < target.limit and c.config(config).model.remat == c.remat for c in found)
    assert found == sorted(found, key=lambda c: (c.seconds, c.peak))
    plans = search(config, target, sizes)
    assert [p.roofline.step for p in plans] == sorted(p.roofline.step for p in plans)
    best = plans[0]
    assert best.roofline.step == pytest.approx(found[0].seconds)
    assert f"--config.mesh.fsdp={best.axes['fsdp']}" in as_json(best, "x.py")["command"]
    assert len(report.ranking(plans)) == len(plans) + 1
    assert set(REMATS) == {"none", *POLICIES}


def test_over_slices_goes_the_axis_that_sends_least(llama):
    """Never tensor or context; without a search the config must say which."""
    config, sizes = llama
    target = find("h100x8")._replace(name="two slices", chip=chip_of("TPU v5 lite"), slices=2, count=8)
    assert all(c.slow in ({"data": 2, "fsdp": 1, "stage": 1}, {"data": 1, "fsdp": 2, "stage": 1}) and
               c.axes["data" if c.slow["data"] == 2 else "fsdp"] % 2 == 0 for c in everything(config, target, sizes))
    best = search(config, target, sizes)[0]
    assert "--config.mesh.dcn_" in as_json(best, "x.py")["command"]
    with pytest.raises(UserError, match="--config.mesh.dcn_data=2"):
        plan(config, target, sizes)


def test_what_cannot_fit_says_what_would(llama):
    config = config_of("70B v5p-256", "mesh.fsdp=8", "mesh.tensor=1")
    sizes = sizes_of(config, config.model.vocab_size)
    target = find("h100x8")
    assert not everything(config, target, sizes)
    assert not plan(config, target, sizes).fits
    advice = what_would_fit(config, target, sizes)
    count = int(re.search(r"(\d+) such devices", advice)[1])
    trial = config_of("70B v5p-256", f"mesh.fsdp={count}", "mesh.tensor=1", "model.remat=full", "batch_size=128")
    assert estimate(trial, sizes, axes(fsdp=count), target.chip).peak < target.limit


# ---- The verb -----------------------------------------------------------------------------------------------------------------


def run(*commands, devices=1):
    """`jaxlm ...`, one command after the other in a process of its own -> [(exit code, standard output, standard error)]."""
    script = """
import contextlib, io, json, sys
from jaxlm.cli import main
ends = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    ends.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(ends))
"""
    env = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace("device_count=8", f"device_count={devices}")}
    done = subprocess.run([sys.executable, "-c", script, json.dumps(commands)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plan_tells_its_json(no_libtpu, capsys):
    assert cli.main(["plan", "--config=configs/llama_1b.py", "--topology=v5e-16", "--config.batch_size=64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"fits", "peak_bytes_per_device", "limit_bytes", "bytes", "flops_per_step", "step_seconds", "tokens_per_second", "mfu",
            "limited_by", "mesh", "remat", "command"} <= set(found)
    assert found["fits"] and found["source"] == "estimated" and sum(found["bytes"].values()) == found["peak_bytes_per_device"]
    assert found["tokens_per_second"] == 64 * 4096 / found["step_seconds"]


def test_plan_takes_the_mesh_that_training_would(no_libtpu, capsys):
    """mesh=auto, and of several slices the factor over them."""
    assert cli.main(["plan", "--config=configs/llama_1b.py", "--topology=v5e-16", "--config.mesh=auto", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = load("configs/llama_1b.py", ["--config.mesh=auto"])
    best, _ = best_mesh(config, find("v5e-16"), sizes_of(config, config.model.vocab_size))
    assert found["mesh"] == best.axes and "--config.mesh=auto" not in found["command"]
    assert cli.main(["plan", "--config=configs/llama_1b.py", "--topology=v5e-16", "--slices=2", "--search", "--json"]) == 0
    assert all("--config.mesh.dcn_" in p["command"] for p in json.loads(capsys.readouterr().out)["ranked"])


def test_plan_without_libtpu_says_what_is_missing(no_libtpu, capsys, tmp_path):
    page = tmp_path / "plan.html"
    assert cli.main(["plan", "--config=configs/llama_1b.py", "--topology=v5e-16", f"--html={page}",
                     "--config.batch_size=512"]) == 0
    out = capsys.readouterr().out
    assert "attention splash" in out and "libtpu" in out and "does NOT fit" in out and "advice" in out  # 32 rows a device
    assert cli.main(["plan", "--config=configs/llama_1b.py", "--topology=h200x8", "--html=/nowhere/plan.html"]) == 2
    said = capsys.readouterr()  # cuDNN does not isolate documents
    assert "attention blockwise, reckoned as if it were a fused kernel" in said.out and "--html=/nowhere/plan.html" in said.err
    text = page.read_text()
    assert text.count("<svg") == 2 and "limit 15.75 GiB" in text and "http" not in text.replace("http://www.w3.org", "")


def test_a_saved_executable_starts_the_same_run(tmp_path):
    """And is refused, with nothing written, where the program is another. One device: several CPU devices may wait for one
    another for good (see `start_jax`)."""
    file, spec = tmp_path / "step", ["--config=configs/llama_1b.py:debug", "--config.steps=3", "--config.observe.report=False"]
    train = lambda name, *more: ["train", *spec, f"--workdir={tmp_path / name}", *more]
    ends = run(["plan", *spec, f"--save={file}"], train("a"))
    assert [code for code, _, _ in ends] == [0, 0], ends
    started, *refused = run(train("b", f"--executable={file}"), train("c", f"--executable={file}", "--config.optimizer.b1=0.8"),
                            train("c", f"--executable={__file__}"))
    assert started[0] == 0, started
    losses = [[json.loads(line)["loss"] for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()] for n in "ab"]
    assert losses[0] == losses[1] and "step from" in "".join(f.read_text() for f in (tmp_path / "b" / "logs").iterdir())
    refused += run(train("c", f"--executable={file}"), devices=2)
    reasons = "another program or machine (step", "not a file that", "devices 1 there, 2 here"
    for (code, _, said), reason in zip(refused, reasons, strict=True):
        assert code == 2 and reason in said, said
    assert not (tmp_path / "c").exists()


def test_a_second_plan_is_not_compiled_again(tmp_path, monkeypatch):
    config = load("configs/llama_1b.py:debug", ["--config.mesh.fsdp=2"])
    sizes, target = sizes_of(config, 257), find("", devices=2)
    first = plan(config, target, sizes, cache=str(tmp_path))
    monkeypatch.setattr("jaxlm.plan.plan.compile_step", lambda *_: pytest.fail("compiled again"))
    second = plan(config, target, sizes, cache=str(tmp_path))
    assert second.compiled == first.compiled._replace(program=None, executable=None)
    with pytest.raises(pytest.fail.Exception):
        plan(load("configs/llama_1b.py:debug", ["--config.mesh.fsdp=2", "--config.seed=1"]), target, sizes, cache=str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("config, options", [
    ("configs/shakespeare.py", ["steps=40", "eval.batches=4"]),
    ("configs/shakespeare.py", ["model.embed_dim=512", "model.num_layers=8", "model.num_heads=8", "seq_len=256", "batch_size=8",
                                "steps=8", "eval.batches=1"]),
    ("configs/gpt2_124m.py", ["data.source=synthetic", "data.tokenizer=byte", "batch_size=4", "seq_len=256", "grad_accum_steps=1",
                              "steps=4", "model.compute_dtype=float32"])])
def test_a_plan_for_one_cpu_foretells_a_runs_memory(config, options, tmp_path, monkeypatch):
    """Peak of the whole process, with evaluations and saves: within 15 %."""
    monkeypatch.setenv("XLA_FLAGS", "")
    options = [f"--config.{o}" for o in (*options, "schedule.warmup_steps=1")]
    (code, said, _), = run(["plan", f"--config={config}", *options, "--json"])
    planned = json.loads(said)["peak_bytes_per_device"]
    (trained, _, error), = run(["train", f"--config={config}", *options, f"--workdir={tmp_path}"])
    assert (code, trained) == (0, 0), error
    assert planned == pytest.approx(json.loads((tmp_path / "summary.json").read_text())["peak_memory_bytes"], rel=0.15)
