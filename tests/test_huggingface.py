"""Hugging Face both ways: for every family the same logits as transformers, and the same bytes after a round trip."""

import fnmatch
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hf_models import (
    CASES,
    FAMILIES,
    PIECES,
    REFUSALS,
    TOKENS,
    UPDATE,
    answer,
    answers,
    by_auto_class,
    golden,
    long_table,
    measured,
    short_table,
    source_rows,
    text_rows,
    with_table,
)

from configs import default
from jaxlm.cli import main
from jaxlm.config import load
from jaxlm.errors import UserError
from jaxlm.huggingface.convert import import_run
from jaxlm.huggingface.load import load_params, open_source
from jaxlm.huggingface.save import config_extras, save
from jaxlm.huggingface.tensors import DTYPES, Planned, open_tensors, write_shards
from jaxlm.models.families import MODEL_TYPES
from jaxlm.models.families.sizes import SIZES
from jaxlm.parallel.mesh import build_mesh
from jaxlm.train.state import build_model, flatten_paths

WITHIN = 1e-4  # absolute, of logits of a few units
ISOLATED = ("--config.data.isolate_documents=True", "--config.mesh.data=1")


def opened(folder, *overrides, devices=1, backend="plain"):
    source = open_source(str(folder), (*ISOLATED, *overrides))
    mesh = build_mesh(source.config, jax.devices()[:devices])
    model = build_model(source.config, source.config.model.vocab_size, backend)
    return source, model, mesh, load_params(source, model, mesh)


def head_of(module):
    """What of a model is compared: its last head."""
    if hasattr(module, "classifier"):
        return lambda x_BTD: module.classes(x_BTD[:, 0])
    return (lambda x_BTD: module.pooled(x_BTD[:, 0])) if hasattr(module, "pooler") else module.logits


def beside(module, rows=slice(None)) -> dict:
    """Tokens' kinds, or what the text is about, where the model has such."""
    if hasattr(module, "token_type_embedding"):
        return {"token_types_BT": text_rows()[0][rows] % 2}
    tokens, segments = source_rows()
    return {"memory": module.encode(tokens[rows], segment_ids_BS=segments[rows])} if hasattr(module, "encode") else {}


def answers_here(model, params) -> list:
    """Of each of PIECES, with all of them in one batch."""
    tokens, segments, positions = text_rows()

    @jax.jit
    def run(params):
        module = nnx.merge(model.graph, params)
        x_BTD, head = module.hidden(tokens, positions, segments, **beside(module))[0], head_of(module)
        return [head(x_BTD[row : row + 1, begin:end])[..., :TOKENS] for row, begin, end in PIECES]

    return [np.asarray(answer.reshape(-1, answer.shape[-1])) for answer in run(params)]


def answers_by_the_token(model, params, at_once: int = 0) -> np.ndarray:
    """Of the first text, through the key/value cache: so many tokens together, the others one at a time."""
    tokens_T = text_rows()[0][0]

    @jax.jit
    def run(params):
        module = nnx.merge(model.graph, params)
        memory = beside(module, slice(1))
        cache = module.init_cache(1, len(tokens_T), **memory)
        if at_once:
            x, cache, _ = module.hidden(tokens_T[None, :at_once], cache=cache, **memory)

        def step(carry, token):
            cache, index = carry
            x, cache, _ = module.hidden(token.reshape(1, 1), cache=cache, cache_index=index, **memory)
            return (cache, index + 1), module.logits(x)[0, 0]

        others = jax.lax.scan(step, (cache, at_once), jnp.asarray(tokens_T[at_once:]))[1]
        return jnp.concatenate([module.logits(x)[0], others]) if at_once else others

    return np.asarray(run(params))[:, :TOKENS]


def check_answers(found: list, wanted: list) -> float:
    """-> the largest difference."""
    for (row, begin, _), mine, theirs in zip(PIECES, found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=WITHIN, rtol=0, err_msg=f"row {row}, from {begin}")
    assert np.abs(wanted[0]).max() > 0.5
    return max(float(np.abs(mine - theirs).max()) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    """At every position of a text, of two documents packed in a row, of one with padding, and token by token."""
    folder, wanted = golden(name)
    source, model, _, params = opened(folder)
    measured(name, "rows", check_answers(answers_here(model, params), wanted))
    if source.config.model.family != "encoder":
        found = answers_by_the_token(model, params)
        np.testing.assert_allclose(found, wanted[0], atol=WITHIN, rtol=0)
        measured(name, "cache", float(np.abs(found - wanted[0]).max()))


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "bert", "t5_v1_1"])
def test_logits_are_the_same_by_another_way(name):
    """By blocks, with scanned layers, where documents are not kept apart, and from a cache that was filled at once."""
    folder, wanted = golden(name)
    scan = ("--config.model.scan_layers=True", "--config.data.isolate_documents=False")
    source, model, _, params = opened(folder, *scan, backend="blockwise")
    found = answers_here(model, params)
    for number in (0, 3):  # a text, and one with padding
        np.testing.assert_allclose(found[number], wanted[number], atol=WITHIN, rtol=0)
    if source.config.model.family != "encoder":
        np.testing.assert_allclose(answers_by_the_token(model, params, at_once=40), wanted[0], atol=WITHIN, rtol=0)


def same_tensors(one, other) -> int:
    """-> how many."""
    plain = lambda folder: {name.removeprefix("bert."): t for name, t in open_tensors(str(folder)).items()}  # as in BertModel
    one, other = plain(one), plain(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.kind, tensor.shape) == (other[name].kind, other[name].shape), name
        assert tensor.rows(0, tensor.shape[0]).tobytes() == other[name].rows(0, tensor.shape[0]).tobytes(), name
    return len(one)


def exported(folder, to, *overrides, **options):
    source, model, mesh, params = opened(folder, *overrides)
    save(str(to), source.family, source.config, model, params, mesh, config_extras(source.values), {}, **options)


@pytest.fixture
def warnings_of_transformers():
    import transformers

    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()
    yield lines
    logger.removeHandler(handler)
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", CASES)
def test_a_round_trip_is_bit_equal(name, tmp_path):
    folder, _ = golden(name)
    exported(folder, tmp_path / "out")
    measured(name, "tensors", same_tensors(folder, tmp_path / "out"))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["out"], "something is left beside it"


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("name", CASES)
def test_transformers_opens_what_is_exported_without_a_warning_and_answers_as_stored(name, tmp_path, warnings_of_transformers):
    folder, wanted = golden(name)
    exported(folder, tmp_path / "out")
    found = answers(str(tmp_path / "out"))
    always = "we will NOT tie them" if name == "t5_v1_1" else "\0"  # whatever config.json says
    assert [line for line in warnings_of_transformers if always not in line] == []
    for logits, stored in zip(found, wanted, strict=True):
        np.testing.assert_allclose(logits[:, :TOKENS], stored, atol=2e-5, rtol=0)


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_transformers(name, tmp_path):
    """Of the loss of the first text, for every tensor; theirs are saved and read as if they were the model."""
    import torch

    folder, _ = golden(name)
    _, model, _, params = opened(folder)
    targets = lambda logits: np.roll(text_rows()[0][0], -1)[: logits.shape[0]] % logits.shape[1]
    theirs = by_auto_class(folder)
    logits = answer(theirs, 0)
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets(logits)).long()).backward()
    for tensor in (*theirs.parameters(), *theirs.buffers()):
        tensor.data = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    theirs.save_pretrained(tmp_path)
    shutil.copy(pathlib.Path(folder, "config.json"), tmp_path)
    wanted = flatten_paths(opened(tmp_path)[-1])

    @jax.jit
    @jax.grad
    def gradient(params):
        module = nnx.merge(model.graph, params)
        logits = head_of(module)(module.hidden(text_rows()[0][:1], **beside(module, slice(1)))[0])
        log_p = jax.nn.log_softmax(logits.reshape(-1, logits.shape[-1]))
        return -jnp.mean(jnp.take_along_axis(log_p, targets(log_p)[:, None], axis=-1))

    found, largest = flatten_paths(gradient(params)), 0.0
    sizes = {path: float(np.abs(array).max()) for path, array in wanted.items()}
    for path, array in wanted.items():
        size = max(sizes[path], 0.01 * np.median(list(sizes.values())))  # those of biases of keys are 0 but for rounding
        largest = max(largest, float(np.abs(found[path] - array).max()) / size)
        assert largest <= WITHIN, path
    measured(name, "gradient", largest)


@pytest.mark.parity("torch", "transformers")
def test_a_lacking_tensor_would_be_warned_of(tmp_path, warnings_of_transformers):
    """That the test above can fail."""
    folder = copy_of(tmp_path)
    rewrite(folder, lambda tensors: tensors.pop("model.norm.weight"))
    answers(str(folder))
    assert "model.norm.weight" in "".join(warnings_of_transformers)


# ---- Files -----------------------------------------------------------------------------------------------------------------


def copy_of(tmp_path, name="llama2", **fields):
    """The folder of a model, to be spoilt, with these fields of config.json changed."""
    folder = tmp_path / name
    shutil.copytree(golden(name)[0], folder)
    if fields:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | fields))
    return folder


def test_shards_with_an_index_and_bfloat16(tmp_path):
    folder = copy_of(tmp_path)
    exported(folder, tmp_path / "narrow", "--config.model.param_dtype=bfloat16", shard_bytes=20_000)
    names = sorted(f.name for f in (tmp_path / "narrow").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    source, *_ = opened(tmp_path / "narrow")
    assert source.config.model.param_dtype == "bfloat16"
    exported(tmp_path / "narrow", tmp_path / "again")
    same_tensors(tmp_path / "narrow", tmp_path / "again")
    (tmp_path / "narrow" / names[1]).unlink()
    with pytest.raises(UserError, match=f"names {names[1]}, which is not there"):
        opened(tmp_path / "narrow")


@pytest.mark.parametrize("name", ["bert_classes", "t5_v1_1", "deepseek_v3"])
def test_runs_of_other_shapes_go_both_ways(name, tmp_path, capsys):
    """By the verb, in bfloat16 with a router in float32: what is no decoder, and what has layers of two kinds."""
    folder = copy_of(tmp_path, name, tie_word_embeddings=name == "bert_classes")
    router = lambda tensor: "gate.weight" in tensor or "e_score" in tensor
    rewrite(folder, lambda tensors: tensors.update(
        {name: a if router(name) else a.astype(ml_dtypes.bfloat16) for name, a in tensors.items()}))
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["convert", f"--from={folder}", f"--workdir={run}"]) == 0
    assert "parameters in bfloat16" in capsys.readouterr().out
    assert main(["convert", f"--workdir={run}", f"--to={out}"]) == 0
    same_tensors(folder, out)
    values = [json.loads((side / "config.json").read_text()) for side in (folder, out)]
    assert [v["architectures"] for v in values] == [[CASES[name].architecture]] * 2
    assert name != "bert_classes" or values[0]["id2label"] == values[1]["id2label"]


@pytest.mark.parity("torch")
def test_a_bin_is_read_by_its_weights_alone(tmp_path):
    import torch

    folder = copy_of(tmp_path)
    tensors = {name: torch.from_numpy(t.rows(0, t.shape[0])) for name, t in open_tensors(str(folder)).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    *_, params = opened(folder)
    np.testing.assert_array_equal(params["embedding"], tensors["model.embed_tokens.weight"].numpy())

    class Harm:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "executed",))

    torch.save({"model.norm.weight": Harm()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights-only loader refuses it"):
        opened(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_mesh_gets_its_own_shards(name, tmp_path):
    """Of a tensor for each expert; of one for all of them, of which every second number is another parameter's."""
    folder = copy_of(tmp_path, name)
    *_, whole = opened(folder)
    overrides = [f"--config.mesh.{axis}=2" for axis in ("fsdp", "tensor", "expert")]
    *_, params = opened(folder, *overrides, devices=8)
    for path, array in flatten_paths(params).items():
        np.testing.assert_array_equal(array, flatten_paths(whole)[path], err_msg=path)
    up = params["layers"]["feedforward"]["experts"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // 8


# ---- What is refused -------------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    tensors = {name: t.rows(0, t.shape[0]) for name, t in open_tensors(str(folder)).items()}
    change(tensors)
    (folder / "model.safetensors").unlink()
    planned = [Planned(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]
    write_shards(folder, planned, 10**9)


def test_missing_unknown_and_misshapen_tensors_are_all_named(tmp_path, monkeypatch):
    folder = copy_of(tmp_path)

    def spoil(tensors):
        tensors.pop("model.layers.2.mlp.up_proj.weight")
        tensors["model.layers.9.extra"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int64)

    monkeypatch.setitem(DTYPES, "I64", np.dtype(np.int64))  # to write it
    rewrite(folder, spoil)
    monkeypatch.undo()
    with pytest.raises(UserError) as error:
        opened(folder)
    said = error.value.problems
    assert len(said) == 4
    for name, what in (("model.layers.2.mlp.up_proj.weight", "missing"), ("model.layers.9.extra", "no such tensor"),
                       ("model.norm.weight", r"is (31,), config.json says (32,)"), ("lm_head.weight", "type I64")):
        assert any(line.startswith(name) and what in line for line in said), name


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: "-".join([r.case, *r.fields]))
def test_config_fields_that_are_not_implemented_are_refused_by_name(refusal, tmp_path):
    with pytest.raises(UserError, match=refusal.said):
        opened(copy_of(tmp_path, refusal.case, **refusal.fields))


def test_older_forms_of_a_checkpoint_are_read(tmp_path):
    """rope_theta and rope_scaling of transformers 4; names of the bare model; a tied head that is stored; buffers."""
    folder = copy_of(tmp_path, "llama3")
    *_, wanted = opened(folder)
    values = json.loads((folder / "config.json").read_text())
    scaling = values.pop("rope_parameters")
    values |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling | {"type": "llama3"}}
    (folder / "config.json").write_text(json.dumps(values))

    def as_before(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()

    rewrite(folder, as_before)
    source, *_, params = opened(folder)
    assert source.config.model.rope_scaling == "llama3" and source.config.model.rope_theta == 1e4
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((5, 5), 7.0))
    with pytest.raises(UserError, match="lm_head.weight: differs"):
        opened(folder)


def test_what_published_checkpoints_have_beside_is_left_out(tmp_path):
    """BERT's with the names and heads of its pretraining; copies of T5's embedding; DeepSeek-V3's layer for one more token. A
    tensor that transformers would look at, or a copy that is none, is not."""
    ones = lambda *shape: np.ones(shape, np.float32)

    def bert(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            tensors[name.replace(".weight", ".gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors |= {
            "bert.pooler.dense.weight": ones(32, 32), "bert.pooler.dense.bias": ones(32), "cls.seq_relationship.bias": ones(2),
            "bert.embeddings.position_ids": ones(1, 96), "cls.predictions.decoder.bias": tensors["cls.predictions.bias"]}

    def t5(tensors):
        copy = tensors["shared.weight"]
        tensors |= {"encoder.embed_tokens.weight": copy, "decoder.embed_tokens.weight": copy, "lm_head.weight": copy}

    def deepseek_v3(tensors):
        tensors["model.layers.61.eh_proj.weight"] = ones(2, 2)

    for name, change, wrong in (("bert", bert, "classifier.weight"), ("t5", t5, "decoder.embed_tokens.weight"),
                                ("deepseek_v3", deepseek_v3, "model.layers.3.eh_proj.weight")):
        folder = copy_of(tmp_path, name)
        *_, wanted = opened(folder)
        rewrite(folder, change)
        *_, params = opened(folder)
        jax.tree.map(np.testing.assert_array_equal, params, wanted)
        if name == "bert":
            assert np.all(opened(folder, "--config.model.pooler=True")[-1]["pooler"]["kernel"] == 1)
        rewrite(folder, lambda tensors, wrong=wrong: tensors.update({wrong: ones(96, 32)}))
        with pytest.raises(UserError, match=f"{wrong}: (is in the checkpoint, and|differs from shared.weight)"):
            opened(folder)


def test_truncated_and_foreign_files_are_refused(tmp_path):
    folder = copy_of(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, said in ((whole[:-100], "cut off within"), (whole[:50], "cut off"), (b"PK\3\4" * 40, "not a safetensors file")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=said):
            opened(folder)
    file.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        opened(folder)
    with pytest.raises(UserError, match="no such folder"):
        opened(tmp_path / "nowhere")


def test_nothing_is_published_where_the_folder_is_not_the_model(tmp_path, monkeypatch):
    folder = copy_of(tmp_path)

    def swapped(folder, planned, *args, **options):
        swap = lambda t: t._replace(make=lambda: t.make()[::-1]) if t.shape == (32,) else t
        write_shards(folder, list(map(swap, planned)), *args, **options)

    monkeypatch.setattr("jaxlm.huggingface.save.write_shards", swapped)
    with pytest.raises(UserError, match="nothing was published"):
        exported(folder, tmp_path / "out")
    monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.huggingface.save.write_json", full)
    with pytest.raises(UserError, match="No space left"):
        exported(folder, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llama2"]
    monkeypatch.undo()
    monkeypatch.setattr("jaxlm.checkpoint.files.os.pwrite", full)
    with pytest.raises(UserError, match="No space left"):
        exported(folder, tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["llama2"]
    with pytest.raises(UserError, match="saving failed .No space left"):
        import_run(str(folder), str(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())
    monkeypatch.undo()
    import_run(str(folder), str(tmp_path / "run"))  # now that there is room
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is there already"):
        exported(folder, tmp_path / "out")


def test_a_model_that_no_family_has_is_refused_by_the_key(tmp_path):
    source, model, mesh, params = opened(copy_of(tmp_path))
    source.config.model.value_residual = True
    with pytest.raises(UserError, match="model.value_residual=True"):
        save(str(tmp_path / "out"), source.family, source.config, model, params, mesh, {}, {})


def test_wrong_arguments_of_convert_end_with_2(tmp_path, capsys):
    assert main(["convert", f"--workdir={tmp_path}"]) == 2
    assert main(["convert", f"--from={tmp_path}", f"--to={tmp_path}", f"--workdir={tmp_path}"]) == 2
    assert main(["convert", f"--from={tmp_path}", "--family=llama", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("give one of --from") == 2 and "--family=llama: is of --to" in said
    folder = copy_of(tmp_path)
    with pytest.raises(UserError, match="is not empty; use another"):
        import_run(str(folder), str(tmp_path))
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(97)}, "unk_token": "w0"},
                 "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
                 "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="has 97 ids, config.json says vocab_size=96"):
        import_run(str(folder), str(tmp_path / "run"))


# ---- The verbs -------------------------------------------------------------------------------------------------------------


def test_convert_generate_eval_train_and_back(tmp_path, jaxlm):
    """A whole folder with a tokenizer; and the fine-tuned run goes back with all that came with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = copy_of(tmp_path)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    text = "to be or not to be that is the question and more of it " * 60
    inner.train_from_iterator([text], trainer)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    (tmp_path / "text.txt").write_text(text)
    data = (f"--config.data.path={tmp_path / 'text.txt'}", "--config.seq_len=16", "--config.mesh.data=1")
    said = jaxlm("convert", f"--from={folder}", f"--workdir={tmp_path / 'run'}", *data)
    assert "llama, 37,152 parameters" in said and "peak host memory" in said, said
    assert "to" in jaxlm("generate", f"--workdir={tmp_path / 'run'}", "--prompt=to be", "--tokens=3")
    assert '"loss"' in jaxlm("eval", f"--workdir={tmp_path / 'run'}", "--json")
    # The folder itself, without a run; nothing is written but the token store of eval.
    direct, before = f"--config.model.from_pretrained={folder}", sorted(tmp_path.rglob("*"))
    written = [jaxlm("generate", source, "--prompt=to be", "--tokens=5", "--temperature=0", *data[1:])
               for source in (f"--workdir={tmp_path / 'run'}", direct)]
    assert written[0] == written[1]
    scores = [json.loads(jaxlm("eval", source, "--json", *data)) for source in (f"--workdir={tmp_path / 'run'}", direct)]
    assert scores[0] == scores[1]
    assert sorted(tmp_path.rglob("*")) == before
    start = [f"--config={pathlib.Path(__file__).parent.parent / 'configs/default.py'}", "--config.steps=2",
             "--config.batch_size=2", "--config.schedule.warmup_steps=0", "--config.observe.report=False", *data]
    losses = []
    for origin in (folder, tmp_path / "run"):
        tuned = tmp_path / f"tuned-{origin.name}"
        jaxlm("train", *start, f"--config.model.from_pretrained={origin}", f"--workdir={tuned}", "--config.observe.log_every=1")
        losses.append([json.loads(line)["loss"] for line in (tuned / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    jaxlm("convert", f"--workdir={tuned}", f"--to={tmp_path / 'out'}")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in folder.iterdir()}
    before, after = (opened(f)[-1] for f in (folder, tmp_path / "out"))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), before, after)
    assert all(0 < change < 0.1 for change in jax.tree.leaves(moved)), moved


def test_plan_takes_the_weights_in_place_of_a_config(tmp_path, jaxlm):
    said = jaxlm("plan", f"--config.model.from_pretrained={copy_of(tmp_path)}", "--estimate", "--json",
                 "--config.data.source=synthetic", "--config.schedule.warmup_steps=0")
    assert json.loads(said)["bytes"]


@pytest.mark.parametrize("verb", ["generate", "eval", "plan"])
def test_without_a_run_or_weights_one_line_says_what_to_give(verb, capsys):
    assert main([verb]) == 2
    assert "--config.model.from_pretrained=DIR" in capsys.readouterr().err


def test_two_processes_import_and_export(tmp_path, jaxlm):
    """What they write is what one writes."""
    from jaxlm.parallel.peers import free_port

    folder = copy_of(tmp_path, "qwen3_moe")

    def both(*args):
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAXLM_NUM_PROCESSES": "2",
               "JAXLM_COORDINATOR": f"127.0.0.1:{free_port()}"}
        started = [subprocess.Popen([sys.executable, "-m", "jaxlm.cli", "convert", *map(str, args)], text=True,
                                    env={**env, "JAXLM_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                   for i in range(2)]
        said = [p.communicate(timeout=120)[0] for p in started]
        assert [p.returncode for p in started] == [0, 0], said
        return "".join(said)

    both(f"--from={folder}", f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=2")
    said = both(f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'out'}")
    assert said.count("read again, its logits differ by") == 1
    same_tensors(folder, tmp_path / "out")
    one_device = ("--config.mesh.fsdp=1", "--config.mesh.data=1")  # the fingerprints are those of any mesh
    jaxlm("convert", f"--workdir={tmp_path / 'run'}", f"--to={tmp_path / 'alone'}", *one_device)
    same_tensors(folder, tmp_path / "alone")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["alone", "out", "qwen3_moe", "run"]


# ---- The Hub ---------------------------------------------------------------------------------------------------------------


class FakeHub(types.ModuleType):
    """huggingface_hub, as far as it is used."""

    class errors:
        HTTPError = type("HTTPError", (Exception,), {})
        RepositoryNotFoundError = type("RepositoryNotFoundError", (HTTPError,), {})
        GatedRepoError = type("GatedRepoError", (RepositoryNotFoundError,), {})
        RevisionNotFoundError = type("RevisionNotFoundError", (HTTPError,), {})
        LocalEntryNotFoundError = type("LocalEntryNotFoundError", (FileNotFoundError,), {})

    def __init__(self, answer):
        super().__init__("huggingface_hub")
        self.answer, self.asked = answer, []

    def snapshot_download(self, repo_id, revision, allow_patterns, ignore_patterns):
        self.asked.append((repo_id, revision))
        assert not any(fnmatch.fnmatch(name, p) for p in allow_patterns for name in ("pytorch_model.bin", "modeling.py"))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_a_repository_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    folder, hub = copy_of(tmp_path), FakeHub(None)
    hub.answer = folder
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    assert open_source("org/tiny").folder == open_source("org/tiny@v1.0").folder == str(folder)
    assert hub.asked == [("org/tiny", None), ("org/tiny", "v1.0")]
    config = load(str(pathlib.Path(default.__file__)), ["--config.model.from_pretrained=org/tiny"])
    assert config.model.vocab_size == 96 and config.model.from_pretrained == "org/tiny"
    for name in ("nowhere", "./a/b", "/a/b", "a/b/c"):
        with pytest.raises(UserError, match="no such folder"):
            open_source(name)
    assert len(hub.asked) == 3


@pytest.mark.parametrize("error, said", [
    (FakeHub.errors.GatedRepoError(), "accept them on its page"), (FakeHub.errors.RepositoryNotFoundError(), "neither a folder"),
    (FakeHub.errors.RevisionNotFoundError(), "no such revision"), (ConnectionError(), "cannot be reached"),
    (FakeHub.errors.LocalEntryNotFoundError(), "cannot be reached"), (FakeHub.errors.HTTPError(), "cannot be reached")])
def test_what_the_hub_refuses_is_one_line(error, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error))
    with pytest.raises(UserError, match=said) as refused:
        open_source("org/tiny@main")
    assert len(refused.value.problems) == 1


def test_the_fake_hub_has_the_errors_of_the_real_one():
    real = pytest.importorskip("huggingface_hub.errors")
    for name in ("HTTPError", "RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "LocalEntryNotFoundError"):
        theirs, fake = getattr(real, name), getattr(FakeHub.errors, name)
        for other in ("RepositoryNotFoundError", "RevisionNotFoundError"):  # the order in which they are caught
            assert issubclass(theirs, getattr(real, other)) == issubclass(fake, getattr(FakeHub.errors, other)), name


def test_without_the_extra_a_repository_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"org/tiny: no such folder; if .* pip install 'jaxlm\[hub\]'"):
        open_source("org/tiny")


def test_a_local_folder_never_touches_the_network(tmp_path, monkeypatch):
    """Also one whose name could be a repository's."""
    (tmp_path / "org").mkdir()
    copy_of(tmp_path / "org", "llama2")

    def forbidden(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket", forbidden)
    monkeypatch.setattr("socket.getaddrinfo", forbidden)
    monkeypatch.chdir(tmp_path)
    opened("org/llama2")
    assert load(default.__file__, ["--config.model.from_pretrained=org/llama2"]).model.vocab_size == 96


def test_training_does_not_import_this():
    done = subprocess.run([sys.executable, "-c", "import sys, jaxlm.cli, jaxlm.train.loop; "
                           "print([m for m in sys.modules if m.startswith(('jaxlm.huggingface', 'torch', 'transformers'))])"],
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_family_of_the_docs_goes_both_ways(tmp_path, monkeypatch):
    """The example of docs/huggingface.md: a Qwen 3 whose projections are fused and whose fields have other names."""
    docs = (pathlib.Path(__file__).parent.parent / "docs/huggingface.md").read_text()
    (tmp_path / "my_family.py").write_text(docs.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(MODEL_TYPES, "_entries", dict(MODEL_TYPES._entries))
    folder = copy_of(tmp_path, "qwen3", tie_word_embeddings=False, model_type="stablemoon")
    *_, wanted = opened(golden("qwen3")[0])
    values = json.loads((folder / "config.json").read_text())
    values["norm_epsilon"] = values.pop("rms_norm_eps")
    kept = {name: value for name, value in values.items() if name not in (
        "attention_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types")}
    (folder / "config.json").write_text(json.dumps(kept))

    def fuse(tensors):
        for i in range(4):
            parts = [tensors.pop(f"model.layers.{i}.self_attn.{x}_proj.weight") for x in "qkv"]
            tensors[f"model.layers.{i}.self_attn.qkv.weight"] = np.concatenate(parts)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    rewrite(folder, fuse)
    use = "--config.imports=('my_family',)"
    *_, params = opened(folder, use)
    for path, array in flatten_paths(params["layers"]).items():
        np.testing.assert_array_equal(array, flatten_paths(wanted["layers"])[path], err_msg=path)
    exported(folder, tmp_path / "out", use)
    same_tensors(folder, tmp_path / "out")


@pytest.mark.parametrize("page, table", [("docs/huggingface.md", long_table), ("README.md", short_table)])
def test_the_tables_of_families_are_what_was_measured(page, table):
    file = pathlib.Path(__file__).parent.parent / page
    text = file.read_text()
    if UPDATE:
        text = with_table(text, table())
        file.write_text(text)
    assert with_table(text, table()) == text
    assert set(FAMILIES) == set(MODEL_TYPES)
    assert page == "README.md" or f"any of {len(SIZES)} published sizes" in text
