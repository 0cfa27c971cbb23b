"""Looking inside: what is told is so, by other means; and nothing of a run changes by it."""

import base64
import json
import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default
from jaxlm.config import resolve
from jaxlm.data.loader import build_data
from jaxlm.kernels.attention import NO_EXTRAS, plain_weights
from jaxlm.observe import heatmap
from jaxlm.observe.internals import build_internals, internals_line, queries_of, surprise, watched
from jaxlm.train.loop import train
from jaxlm.train.step import build_program

ROOM = {"seq_len": 16, "batch_size": 4, "mesh.data": 1, "model.num_layers": 2, "model.embed_dim": 16, "model.num_heads": 2,
        "data.source": "synthetic", "data.tokenizer": "byte", "model.vocab_size": 64, "steps": 4, "eval.every_steps": 0,
        "observe.log_every": 1, "observe.progress": "none", "observe.compile_cache": False, "schedule.warmup_steps": 0}


def small(**more):
    c = default.get_config()
    with c.ignore_type():
        for key, value in {**ROOM, **{name.replace("__", "."): value for name, value in more.items()}}.items():
            group, _, name = key.rpartition(".")
            setattr(c[group] if group else c, name, value)
    resolve(c)
    return c


def looked(c):
    """-> (the line of the first step, parameters before and after it, the step's metrics, batch, program)."""
    data = build_data(c)
    program = build_program(c, data.vocab_size)
    batch = program.feed.put(data.train.batch(0))
    state = jax.jit(program.init, out_shardings=program.shardings)(c.seed)
    before = jax.device_get(state["params"])
    line = internals_line(1, jax.device_get(build_internals(c, program)(state, batch, program.hyper)))
    after, metrics = program.compile()[0](state, batch, program.hyper)
    return line, before, jax.device_get(after["params"]), jax.device_get(metrics), batch, program


def last(program, params, batch):
    """What the last block, or the norm after it, gives."""
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
    return jax.jit(lambda params: nnx.merge(program.model.graph, params).hidden(*inputs)[0])(params)


def root_mean_square(*arrays):
    return math.sqrt(sum(np.sum(np.square(a, dtype=np.float64)) for a in arrays) / sum(a.size for a in arrays))


def test_norms_are_those_of_the_step_and_activations_those_of_the_model():
    line, before, after, metrics, batch, program = looked(small(grad_accum_steps=2))
    kernels = lambda tree, i: [leaf[i] for leaf in jax.tree.leaves(tree["layers"]["feedforward"])]
    for i in (0, 1):
        moved = [new - old for new, old in zip(kernels(after, i), kernels(before, i), strict=True)]
        assert line[f"layers/{i}/feedforward/update_rms"] == pytest.approx(root_mean_square(*moved), rel=1e-3)
    sizes = {f"layers/{i}/{name}": sum(leaf[i].size for leaf in jax.tree.leaves(part))
             for i in (0, 1) for name, part in before["layers"].items() if name in ("attention", "feedforward")}
    sizes |= {f"layers/{i}/norms": 2 * 16 for i in (0, 1)} | {"embedding": 64 * 16, "final_norm": 16}
    whole = math.sqrt(sum(size * line[f"{module}/grad_rms"] ** 2 for module, size in sizes.items()))
    assert whole == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    assert {name.removesuffix("/grad_rms") for name in line if name.endswith("grad_rms")} == set(sizes)
    x_BTD = last(program, before, batch)
    assert line["final_norm/activation_rms"] == pytest.approx(root_mean_square(np.asarray(x_BTD)), rel=1e-5)


def test_entropy_is_that_of_each_heads_weights():
    q, k = (jax.random.normal(jax.random.key(i), (2, 100, 4, 8)) for i in (0, 1))
    v, ids = jnp.ones((2, 100, 4, 8)), jnp.repeat(jnp.array([[1, 2], [1, 1]]), 50, axis=1)
    for window, segments in ((0, None), (7, None), (0, ids)):
        run = lambda q, window=window, segments=segments: watched(q, k, v, window, 0.0, segments, 0)
        told, = [e.invars[0].aval.shape for e in jax.make_jaxpr(run)(q).eqns if e.primitive.name == "name"]
        assert told == (2, 4, 64)
        weights = np.asarray(plain_weights(q, k, window, 0.0, segments, 0), np.float64)[:, :, 0]  # a key head for each query
        wanted = -np.sum(np.where(weights > 0, weights * np.log(np.maximum(weights, 1e-300)), 0), axis=-1)
        at = queries_of(100)
        positions = (at - np.arange(64))[:, None]
        extras = NO_EXTRAS._replace(key_segment_ids_BS=segments)
        part = plain_weights(q[:, at], k, window, 0.0, None if segments is None else segments[:, at], positions, extras)
        np.testing.assert_allclose(np.sum(surprise(part), axis=-1)[:, :, 0], wanted[..., at], atol=1e-5)
    assert 0.0 <= wanted.min() and wanted.max() <= math.log(100)


def test_experts_have_their_load_and_an_untrained_attention_looks_everywhere():
    line, before, _, _, batch, program = looked(small(model__feedforward="moe", model__num_experts=4, model__scan_layers=True,
                                                      model__num_layers=1, model__norm="none"))
    x_BTD = last(program, before, batch)  # without a norm, the last block's
    assert line["layers/0/activation_rms"] == pytest.approx(root_mean_square(np.asarray(x_BTD)), rel=1e-5)
    even = sum(math.log(t + 1) for t in range(16)) / 16
    assert line["layers/0/attention/attention_entropy"] == pytest.approx(even, abs=1e-3)
    assert 0 <= line["layers/0/feedforward/router_load_min"] <= 1 <= line["layers/0/feedforward/router_load_max"] <= 4


def test_a_run_that_looks_has_the_same_bits_and_shows_what_it_saw(tmp_path):
    for name, every in (("plain", 0), ("looking", 2)):
        train(small(observe__internals_every=every, model__dropout=0.1, model__num_layers=1), str(tmp_path / name))
    lines = {name: [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("plain", "looking")}
    inside = [x for x in lines["looking"] if x["split"] == "internals"]
    assert [x["step"] for x in inside] == [2, 4] and not any(x["split"] == "internals" for x in lines["plain"])
    exact = lambda name: [(x["step"], x["loss"], x["grad_norm"]) for x in lines[name] if x["split"] == "train"]
    assert exact("plain") == exact("looking") and len(exact("plain")) == 4
    prints = lambda name: {k: v["fingerprint"] for k, v in json.loads(
        (tmp_path / name / "checkpoints/4/meta/metadata").read_text())["leaves"].items()}
    assert prints("plain") == prints("looking")
    page = (tmp_path / "looking/report.html").read_text()
    assert "Gradient RMS: attention" in page and "Attention entropy" in page
    assert "Inside the layers" not in (tmp_path / "plain/report.html").read_text()


def test_the_picture_has_the_numbers():
    lines = [{"split": "internals", "step": step, **{f"layers/{i}/attention/grad_rms": 10.0 ** (i - step) for i in (0, 1)}}
             for step in (1, 2, 3)]
    page = heatmap.heatmaps(lines)
    assert page.count("<image") == 2 and "Gradient RMS: attention" in page
    image = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    raw = zlib.decompress(image[image.index(b"IDAT") + 4 : image.index(b"IEND") - 8])
    top, bottom = raw[1:10], raw[11:20]  # layer 1, layer 0: three pixels each
    assert top[:3] == bytes(heatmap.COLORS[-1]) and bottom[-3:] == bytes(heatmap.COLORS[0])
    assert bottom[:6] == top[3:]  # layer 0 at steps 1, 2 is what layer 1 is at 2, 3
    nothing = heatmap.heatmaps([{"split": "internals", "step": 1, "layers/0/attention/update_rms": 0.0}])
    assert nothing.count("<image") == 2  # a learning rate too small for bfloat16
