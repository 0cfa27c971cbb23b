"""Adapters, frozen parameters, and runs that start with a part of another model."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import golden, text_rows
from test_huggingface import ISOLATED, copy_of, opened, rewrite
from test_step import run, tiny

from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.huggingface.adapter import merge_adapters, save_adapter
from jaxlm.huggingface.tensors import read_safetensors
from jaxlm.models.families import MODEL_TYPES
from jaxlm.train.pretrained import pretrained_params
from jaxlm.train.restore import open_run
from jaxlm.train.state import build_model, flatten_paths
from jaxlm.train.step import build_program

EVERYWHERE = r"(attention|feedforward)\..*"
MOE = dict(model__feedforward="moe", model__num_experts=4, model__experts_per_token=2)
DEFAULT = str(pathlib.Path(__file__).parent.parent / "configs" / "default.py")


def logits_of_rows(model, params):
    """(rows, T, V) of `text_rows`."""
    tokens, segments, positions = text_rows()

    @jax.jit
    def run(params):
        module = nnx.merge(model.graph, params)
        return module.logits(module.hidden(tokens, positions, segments)[0])

    return np.asarray(run(params))


def perturbed(params):
    """Adapters that do something: of a new one, one half is zero."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype) if "lora" in path[-1].key else a, params)


@pytest.mark.parametrize("changes", [{}, dict(model__attention="latent", model__kv_rank=16, model__query_rank=8),
                                     dict(kernels__fused_projections="always", model__feedforward="swiglu"),
                                     dict(MOE, model__lora_modules=".*", model__tie_embeddings=False),
                                     dict(MOE, model__routing="capacity")])
def test_a_model_with_adapters_is_the_one_they_are_merged_into(changes):
    c = tiny(**dict(model__lora_rank=4, model__lora_modules=EVERYWHERE) | changes)
    model = build_model(c, 96, "plain")
    params = perturbed(model.init(jax.random.key(0)))
    _, base, merged = merge_adapters(c, model, params)
    assert not any("lora" in path for path in flatten_paths(base.specs))
    with_adapters, without = logits_of_rows(model, params), logits_of_rows(base, merged)
    assert np.abs(with_adapters - without).max() < 1e-5 * np.abs(without).max()
    plain = logits_of_rows(base, jax.tree_util.tree_map_with_path(lambda path, _: leaf(params, path), merged))
    assert np.abs(with_adapters - plain).max() > 1e-3 * np.abs(plain).max()


def leaf(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize("changes", [
    pytest.param(dict(optimizer__freeze="embedding|layers/attention/.*"), marks=pytest.mark.slow),
    dict(optimizer__freeze=".*(kernel|embedding)", grad_accum_steps=4),
    pytest.param(dict(optimizer__freeze="layers/.*", mesh__fsdp=8, optimizer__name="muon"), marks=pytest.mark.slow),
    dict(model__lora_rank=4, optimizer__ema_decay=0.5, mesh__fsdp=2, mesh__tensor=2)])
def test_what_is_frozen_keeps_its_bits_and_has_no_moments(changes):
    """And what trains moves as in a run whose other learning rates are zero."""
    changes |= dict(optimizer__clip_norm=0.0)
    _, state, _, model = run(tiny(**changes))
    trained = set(flatten_paths(model.trained))
    moved = {path.removeprefix("params/") for path in trained}
    fresh = flatten_paths(run(tiny(**changes), steps=0)[1]["params"])
    for path, a in flatten_paths(state["params"]).items():
        assert np.array_equal(a, fresh[path]) == (path not in moved), path
    moments = [path for path in flatten_paths(state["opt_state"]) if any(path.endswith("/" + p) for p in fresh)]
    assert moments and all(any(path.endswith("/" + p) for p in trained) for path in moments)
    frozen = "|".join(path for path in fresh if path not in trained)
    groups = ((frozen, 0.0, 0.0), *((f"(?!({frozen})$){regex}", lr, wd) for regex, lr, wd in tiny().optimizer.groups))
    changes = {k: v for k, v in changes.items() if k not in ("optimizer__freeze", "model__lora_rank")}
    if "lora" not in "".join(trained):
        losses, other, _, _ = run(tiny(**changes, optimizer__groups=groups))
        for path, a in flatten_paths(other["params"]).items():
            np.testing.assert_allclose(flatten_paths(state["params"])[path], a, atol=2e-6, err_msg=path)


def test_adapters_train_the_same_on_a_mesh():
    """Those of experts, the embedding and the head too."""
    adapters = dict(MOE, model__lora_rank=4, model__lora_modules=".*", model__tie_embeddings=False, optimizer__learning_rate=0.01)
    alone, state, _, _ = run(tiny(**adapters))
    assert all(np.any(array) for path, array in flatten_paths(state["params"]).items() if "lora" in path), "all have moved"
    np.testing.assert_allclose(run(tiny(**adapters, mesh__expert=2, mesh__fsdp=2, mesh__tensor=2))[0], alone, rtol=1e-5)


def test_the_choice_of_what_trains_is_checked():
    for changes, said in ((dict(optimizer__freeze="heed"), "matches no parameter"), (dict(optimizer__freeze="("), "is no regex"),
                          (dict(optimizer__freeze=".*"), "freezes every parameter"),
                          (dict(model__lora_rank=2, model__lora_modules="q_proj"), "attention.query"),
                          (dict(model__lora_rank=2, model__lora_modules="("), "is no regex"),
                          (dict(model__lora_rank=2, model__lora_modules=".*", model__tie_embeddings=True), "is the head too")):
        with pytest.raises(UserError, match=said):
            build_model(tiny(**changes), 48, "plain")


# ---- A start with a part of another model ------------------------------------------------------------------------------------


def started(folder, *overrides):
    """-> (program, parameters that it starts with, its own, lines)."""
    config = load(DEFAULT, [*ISOLATED, f"--config.model.from_pretrained={folder}", "--config.batch_size=8", *overrides])
    program = build_program(config, config.model.vocab_size, jax.devices()[:1])
    fresh = jax.jit(program.init)(0)["params"]
    params, lines = pretrained_params(program, config, fresh)
    return program, flatten_paths(params), flatten_paths(fresh), lines


def test_a_vocabulary_of_another_size_keeps_the_words_of_both():
    folder = golden("gpt2")[0]
    whole = flatten_paths(opened(folder)[-1])["embedding"]
    for size in (64, 128):
        _, params, _, _ = started(folder, f"--config.model.vocab_size={size}")
        both = min(size, whole.shape[0])
        np.testing.assert_array_equal(params["embedding"][:both], whole[:both])
        assert params["embedding"].shape[0] == size
        np.testing.assert_allclose(params["embedding"][both:], np.broadcast_to(whole.mean(0), (size - both, whole.shape[1])),
                                   atol=1e-6)


def test_a_new_head_and_fewer_layers_start_with_the_rest():
    folder = golden("llama2")[0]
    whole = flatten_paths(opened(folder)[-1])
    _, params, fresh, lines = started(folder, "--config.model.from_scratch=head/kernel", "--config.model.num_layers=1")
    np.testing.assert_array_equal(params["head/kernel"], fresh["head/kernel"])
    np.testing.assert_array_equal(params["layers/feedforward/up/kernel"], whole["layers/feedforward/up/kernel"][:1])
    assert lines == ["from scratch: head/kernel"]
    _, params, _, lines = started(folder, "--config.model.tie_embeddings=True")
    assert "head/kernel" not in params and lines == [f"not taken from {folder}: head/kernel"]


def test_what_the_other_model_lacks_must_be_named():
    folder = golden("gpt2")[0]  # tied
    with pytest.raises(UserError, match="lm_head.weight: is missing"):
        started(folder, "--config.model.tie_embeddings=False")
    _, params, fresh, _ = started(folder, "--config.model.tie_embeddings=False", "--config.model.from_scratch=head/kernel")
    np.testing.assert_array_equal(params["head/kernel"], fresh["head/kernel"])
    with pytest.raises(UserError, match="matches no parameter"):
        started(folder, "--config.model.from_scratch=classifier")


# ---- PEFT --------------------------------------------------------------------------------------------------------------------


def adapted(family, folder, to, modules=EVERYWHERE):
    """An adapter of these modules, written by `save_adapter`. -> (program, the model's parameters)."""
    program, params, _, _ = started(folder, "--config.model.lora_rank=3", "--config.model.lora_alpha=5",
                                    f"--config.model.lora_modules={modules}")
    leaves, tree = jax.tree_util.tree_flatten_with_path(program.model.specs, is_leaf=lambda x: hasattr(x, "axes"))
    params = perturbed(tree.unflatten(params.values()))
    config = load(DEFAULT, [f"--config.model.from_pretrained={folder}", "--config.model.lora_rank=3",
                            "--config.model.lora_alpha=5", f"--config.model.lora_modules={modules}"])
    save_adapter(str(to), MODEL_TYPES[family], config, program.model, params, folder)
    return program, params


MODULES = {"llama2": ".*", "gemma2": EVERYWHERE, "gpt_oss": "attention.out|.*experts.*|head", "qwen3_moe": ".*",
           "deepseek_v3": r"attention\.out|.*experts\.(up|down)"}


def family_of(folder) -> str:
    return json.loads(pathlib.Path(folder, "config.json").read_text())["model_type"]


@pytest.mark.parametrize("name", ["llama2", "gemma2", "gpt_oss", "qwen3_moe"])
def test_an_adapter_goes_out_and_in_bit_for_bit(name, tmp_path):
    folder = golden(name)[0]
    program, params = adapted(family_of(folder), folder, tmp_path / "adapter", MODULES[name])
    again, started_with, _, _ = started(folder, f"--config.model.adapter={tmp_path / 'adapter'}")
    for path, array in flatten_paths(params).items():
        np.testing.assert_array_equal(started_with[path], array, err_msg=path)
    assert again.model.num_trained == sum(a.size for path, a in flatten_paths(params).items() if "lora" in path)


def logits_by_peft(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(text_rows()[0][:1]).long()).logits[0].numpy()


@pytest.mark.parity("torch", "transformers", "peft")
@pytest.mark.parametrize("name", MODULES)
def test_peft_opens_the_adapter_and_gives_the_same_logits(name, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    folder = golden(name)[0]
    program, params = adapted(family_of(folder), folder, tmp_path / "adapter", MODULES[name])
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain = logits_by_peft(base)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    theirs = logits_by_peft(model)
    assert np.abs(theirs - plain).max() > 0.1
    assert np.abs(logits_of_rows(program.model, params)[0] - theirs).max() < 1e-4
    kept = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(kept) == set(read_safetensors(tmp_path / "adapter" / "adapter_model.safetensors"))
    np.testing.assert_allclose(logits_by_peft(model.merge_and_unload()), theirs, atol=1e-4)


@pytest.mark.parity("torch", "transformers", "peft")
@pytest.mark.parametrize("name, targets", [
    ("llama2", dict(target_modules=["q_proj", "lm_head", "embed_tokens"], use_rslora=True)),
    ("qwen3_moe", dict(target_modules=r".*self_attn\.v_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"])),
    ("gpt_oss", dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]))])
def test_an_adapter_of_pefts_own_is_read(name, targets, tmp_path):
    """With the embedding and the head that PEFT puts beside theirs."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    folder = golden(name)[0]
    base, config = AutoModelForCausalLM.from_pretrained(folder), peft.LoraConfig(r=3, lora_alpha=5, **targets)
    model = peft.get_peft_model(base, config).eval()
    for tensor in model.parameters():
        if tensor.requires_grad:
            tensor.data = 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
    model.save_pretrained(str(tmp_path))
    program, params, _, _ = started(folder, f"--config.model.adapter={tmp_path}")
    leaves = jax.tree.structure(program.model.specs, is_leaf=lambda x: hasattr(x, "axes"))
    assert np.abs(logits_of_rows(program.model, leaves.unflatten(params.values()))[0] - logits_by_peft(model)).max() < 1e-4


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    folder = golden("llama2")[0]
    adapted("llama", folder, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    for change, said in ((dict(use_dora=True), "use_dora=True is not implemented"), (dict(peft_type="LOHA"), "LORA is read"),
                         (dict(target_modules=["c_attn"]), "llama has"), (dict(r=4), "the model asks for"),
                         (dict(target_modules=["q_proj"]), "is unknown"), (dict(rank_pattern={"q_proj": 9}), "has q_proj; here"),
                         (dict(target_parameters=["mlp.experts.down_proj"]), "those of routed experts are read")):
        file.write_text(json.dumps(values | change))
        with pytest.raises(UserError, match=said):
            started(folder, f"--config.model.adapter={tmp_path / 'adapter'}")
    with pytest.raises(UserError, match="in one tensor with others"):
        adapted("phi3", golden("phi3")[0], tmp_path / "other")
    with pytest.raises(UserError, match="PEFT takes a feed-forward of this name for the routed experts"):
        adapted("deepseek_v3", golden("deepseek_v3")[0], tmp_path / "other", r"feedforward\.up")


def test_a_run_with_adapters_is_evaluated_resumed_and_converted(tmp_path, jaxlm):
    (tmp_path / "text.txt").write_text("to be or not to be that is the question and more of it " * 60)
    common = [f"--config={DEFAULT}", f"--config.data.path={tmp_path / 'text.txt'}", "--config.data.tokenizer=char",
              "--config.seq_len=16", "--config.batch_size=2", "--config.mesh.data=1", "--config.schedule.warmup_steps=0",
              "--config.observe.report=False", "--config.model.lora_rank=4",
              f"--config.model.from_pretrained={(folder := copy_of(tmp_path))}"]
    common += [f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rate=0.1", "--config.checkpoint.every_steps=1",
               "--config.checkpoint.keep=2"]
    jaxlm("train", *common, "--config.steps=2")
    assert '"loss"' in jaxlm("eval", f"--workdir={tmp_path / 'run'}", "--json")
    jaxlm("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'adapter'}", "--adapter")
    assert "37,152 parameters" in jaxlm("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'merged'}")
    base, merged = (flatten_paths(opened(f)[-1]) for f in (folder, tmp_path / "merged"))
    moved = {path for path in base if not np.array_equal(base[path], merged[path])}
    assert moved == {"layers/attention/query/kernel", "layers/attention/value/kernel"}
    # Its checkpoints have no weights of the base, and a run that goes on is the same bit for bit.
    last = tmp_path / "run" / "checkpoints" / "2"
    saved, base = (json.loads((last / "meta" / "metadata").read_text())[what] for what in ("leaves", "base"))
    assert all(re.fullmatch(".*/lora_[ab]", name) for name in saved if name.startswith("params/"))
    assert "params/embedding" in base and not set(base) & set(saved)
    shutil.rmtree(last)
    (tmp_path / "run" / "summary.json").unlink()
    jaxlm("train", *common, "--config.steps=2")
    assert json.loads((last / "meta" / "metadata").read_text())["leaves"] == saved
    # So it is with a run that begins with its weights and adapters.
    shape = ("num_layers=4", "embed_dim=32", "num_heads=4", "num_kv_heads=2", "head_dim=8", "mlp_dim=48", "vocab_size=96",
             "tie_embeddings=False", "norm_eps=1e-5", "feedforward=swiglu")
    jaxlm("train", *common, *(f"--config.model.{size}" for size in shape), "--config.steps=1", f"--workdir={tmp_path / 'next'}",
          f"--config.model.from_pretrained={tmp_path / 'run'}")
    np.testing.assert_array_equal(*(open_run(str(tmp_path / run)).params["embedding"] for run in ("run", "next")))
    # A base that has changed, or is gone, is named.
    shutil.copytree(folder, tmp_path / "kept")
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, 7.0))
    for said in ("is no longer what it was when .*final_norm/scale differs", "not its weights, which cannot be read"):
        with pytest.raises(UserError, match=said):
            open_run(str(tmp_path / "run"))
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder)
    assert open_run(str(tmp_path / "run")).step == 2
