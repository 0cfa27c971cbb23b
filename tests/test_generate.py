"""Writing text: the cache gives what the whole text gives, whatever else is being written; sampling, beams, stop strings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_models import golden
from scipy.special import log_softmax
from test_huggingface import opened
from test_step import tiny

from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.errors import UserError
from jaxlm.generate.beam import BeamSearch
from jaxlm.generate.decoding import Generator, Request
from jaxlm.generate.sampling import Sampling, draw, pick, rule_out
from jaxlm.generate.text import Text
from jaxlm.train.state import build_model

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 3, 40], [7] * 20, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [33]]
SHAPES = {
    "multihead": {},
    "grouped, windows, scanned": dict(model__num_kv_heads=1, model__window_pattern="LG", model__window=8, model__scan_layers=True,
                                      model__remat="full"),
    "latent, experts": dict(model__attention="latent", model__kv_rank=16, model__feedforward="moe", model__num_experts=4,
                            model__experts_per_token=2, model__first_dense_layers=1),
    "n-grams, value residual": dict(model__ngram_max=3, model__value_residual=True),
}


def model_of(seq_len=96, **changes):
    model = build_model(tiny(seq_len=seq_len, **changes), 64, "blockwise")
    return model, jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(1)))  # clear preferences


def read(model, params, tokens_BT):
    """Logits of whole texts."""
    run = lambda params, tokens: (module := nnx.merge(model.graph, params)).logits(module.hidden(tokens)[0])
    return np.asarray(jax.jit(run)(params, tokens_BT))


def uncached(model, params, prompt, num_tokens, seq_len, source=None):
    """The likeliest token after the whole text, again and again; a text that fills the context goes on from its last half."""

    @jax.jit
    def logits(tokens_1T, length):
        module, options = nnx.merge(model.graph, params), {}
        if module.prefix_attention:
            options["prefix_BS"] = jnp.arange(seq_len)[None] < len(prompt)
        if source is not None:
            options["memory"] = module.encode(jnp.asarray([source]), segment_ids_BS=jnp.ones((1, len(source)), jnp.int32))
        return module.logits(module.hidden(tokens_1T, **options)[0][:, length - 1][:, None])[0, 0]

    text, context = list(prompt), list(prompt)
    for _ in range(num_tokens):
        filled = np.zeros((1, seq_len), np.int32)
        filled[0, : len(context)] = context
        token = int(jnp.argmax(logits(filled, len(context))[:60]))
        text.append(token)
        context = [*context, token] if len(context) < seq_len else text[-(seq_len // 2 + 1) :]
    return text[len(prompt) :]


def written(generator, params, requests, rows=8):
    """{request: its tokens}, which come one by one and end with `last`."""
    out = {i: [] for i in range(len(requests))}
    for token in generator.stream(params, requests, rows):
        assert len(out[token.request]) < requests[token.request].num_tokens
        out[token.request].append(token)
    assert all([t.last for t in tokens] == [False] * (len(tokens) - 1) + [True] for tokens in out.values())
    return {i: [t.id for t in tokens] for i, tokens in out.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_unequal_length_get_what_the_whole_text_gives(name):
    """Past the growing of the cache (64) and past the context (96), three rows for four texts, padding ids never. The first and
    the third prompt are read together, the others alone, and so is the text that goes on from its last half."""
    model, params = model_of(**SHAPES[name])
    generator, lengths, shapes = Generator(model, 60, 96), (85, 100, 3, 30), []
    requests = [Request(prompt, n, GREEDY) for prompt, n in zip(PROMPTS, lengths, strict=True)]
    prefill = generator.prefill
    generator.prefill = lambda params, prompts, *args, **kwargs: (
        shapes.append(prompts[0].shape) or prefill(params, prompts, *args, **kwargs))
    got = written(generator, params, requests, rows=3)
    assert shapes == [(3, 1, 16), (1, 1, 32), (1, 1, 16), (1, 1, 64)]
    for i, (prompt, n) in enumerate(zip(PROMPTS, lengths, strict=True)):
        assert got[i] == uncached(model, params, prompt, n, 96), i


def test_an_encoder_decoder_writes_about_its_source():
    model, params = model_of(model__family="encoder_decoder", model__position="relative")
    sources = [[4, 5, 6, 7], [9] * 21]
    requests = [Request([1], 12, GREEDY, source=source) for source in sources]
    got = written(Generator(model, 60, 96), params, requests)
    assert [got[i] for i in (0, 1)] == [uncached(model, params, [1], 12, 96, source) for source in sources]
    assert got[0] != got[1]
    best = BeamSearch(Generator(model, 60, 96), 1).search(params, requests)
    assert [hypotheses[0].ids for hypotheses in best] == [got[0], got[1]]


def test_a_prefix_is_read_at_once_both_ways():
    model, params = model_of(model__prefix_attention=True)
    requests = [Request(prompt, 12, GREEDY) for prompt in PROMPTS[:3:2]]
    got = written(Generator(model, 60, 96), params, requests)
    assert [got[i] for i in (0, 1)] == [uncached(model, params, prompt, 12, 96) for prompt in PROMPTS[:3:2]]
    best = BeamSearch(Generator(model, 60, 96), 1).search(params, requests)
    assert [hypotheses[0].ids for hypotheses in best] == [got[0], got[1]]
    causal, _ = model_of()
    assert written(Generator(causal, 60, 96), params, requests) != got


def test_what_a_text_gets_does_not_depend_on_the_others():
    model, params = model_of()
    generator = Generator(model, 60, 96)
    requests = [Request(prompt, 12, Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2), seed=i)
                for i, prompt in enumerate(PROMPTS)]
    requests[1] = requests[1]._replace(options=GREEDY)
    requests[2] = requests[2]._replace(options=Sampling())
    together = written(generator, params, requests, rows=4)
    assert together == {i: written(generator, params, [r], rows=1)[0] for i, r in enumerate(requests)}
    assert together != written(generator, params, [r._replace(seed=r.seed + 7) for r in requests], rows=4)


def test_log_probabilities_are_the_models_and_a_stop_id_ends_a_text():
    model, params = model_of()
    tokens = list(Generator(model, 60, 96).stream(params, [Request(PROMPTS[0], 8, GREEDY)]))
    text = PROMPTS[0] + [t.id for t in tokens]
    logits = read(model, params, np.array([text]))[0, :, :60]
    expected = log_softmax(logits, axis=-1)[np.arange(2, len(text) - 1), text[3:]]
    np.testing.assert_allclose([t.log_probability for t in tokens], expected, atol=1e-4)
    stop = tokens[3].id
    again = list(Generator(model, 60, 96).stream(params, [Request(PROMPTS[0], 8, GREEDY, stop=frozenset({stop}))]))
    assert again == tokens[: [t.id for t in tokens].index(stop)] + [again[-1]] and again[-1].id == stop and again[-1].last


def test_requests_that_cannot_be_served_are_refused():
    model, _ = model_of(seq_len=16)
    generator = Generator(model, 60, 16)
    for request, said in ((Request([], 3), "is empty"), (Request([1] * 16, 3), "context is 16"),
                          (Request([1], 3, Sampling(top_p=0.0)), "top_p=0.0"),
                          (Request([1], 3, Sampling(temperature=-1.0)), "temperature=-1.0"),
                          (Request([1], 3, source=[2]), "no other family")):
        with pytest.raises(UserError, match=said):
            generator.check(request)


# ---- Sampling ----------------------------------------------------------------------------------------------------------------


def by_sorting(logits, o: Sampling):
    """numpy, the plain way."""
    kept = np.ones(len(logits), bool)
    if o.top_k:
        kept &= logits >= np.sort(logits)[::-1][min(o.top_k, len(logits)) - 1]
    p = np.where(kept, np.exp((logits - logits.max()).astype(np.float64)), 0)
    p /= p.sum()
    above = np.array([p[p > x].sum() for x in p])
    kept &= above < o.top_p
    return kept & (p >= o.min_p * p.max())


@pytest.mark.parametrize("options", [Sampling(top_k=1), Sampling(top_k=7), Sampling(top_k=500), Sampling(top_p=0.5),
                                     Sampling(top_p=0.01), Sampling(min_p=0.2), Sampling(top_k=40, top_p=0.7, min_p=0.05)])
def test_what_is_ruled_out_is_what_sorting_rules_out(options):
    rng = np.random.default_rng(0)
    for spread in (0.1, 1.0, 5.0):
        logits = (spread * rng.standard_normal(300)).astype(np.float32)
        logits[:40] = logits[40:80]  # equals
        kept = np.asarray(jax.jit(rule_out)(logits, options)) > -np.inf
        np.testing.assert_array_equal(kept, by_sorting(logits, options))


def test_samples_follow_the_probabilities_and_the_penalty_holds_back_what_was_said():
    logits, seen = jnp.asarray([2.0, 1.0, -1.0, 0.5]), jnp.asarray([True, False, True, False])
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = jax.jit(lambda options, seen: jax.vmap(lambda key: pick(logits, options, seen, key)[0])(keys))
    draw = lambda options, seen: np.bincount(tokens(options, seen), minlength=4) / 20_000
    np.testing.assert_allclose(draw(Sampling(temperature=2.0), None), jax.nn.softmax(logits / 2), atol=0.015)
    penalised = jnp.asarray([1.0, 1.0, -2.0, 0.5])
    np.testing.assert_allclose(draw(Sampling(repetition_penalty=2.0), seen), jax.nn.softmax(penalised), atol=0.015)
    assert int(pick(logits, Sampling(temperature=0.0, repetition_penalty=4.0), seen, keys[0])[0]) == 1


def test_draws_over_many_blocks_follow_the_probabilities():
    """Some of them at the borders of blocks."""
    logits = np.full(600, -np.inf, np.float32)
    logits[[0, 1, 100, 255, 256, 257, 300, 400, 511, 512, 598, 599]] = 2 * np.random.default_rng(0).normal(size=12)
    keys = jax.random.split(jax.random.key(0), 20_000)
    share = np.bincount(jax.jit(jax.vmap(lambda key: draw(logits, key)))(keys), minlength=600) / 20_000
    wanted = np.asarray(jax.nn.softmax(logits))
    assert not share[wanted == 0].any()
    deviation = np.sqrt(wanted * (1 - wanted) / 20_000)
    assert np.max(np.abs(share - wanted)[wanted > 0] / deviation[wanted > 0]) < 4


# ---- Beams -------------------------------------------------------------------------------------------------------------------


def test_many_beams_find_the_likeliest_text_of_all():
    """Against all 8^4 texts of four tokens."""
    c = tiny(seq_len=16)
    model = build_model(c, 8, "plain")
    params = jax.tree.map(lambda a: 4 * a, model.init(jax.random.key(2)))
    texts = np.stack(np.meshgrid(*[np.arange(8)] * 4, indexing="ij"), -1).reshape(-1, 4)
    rows = np.concatenate([np.full((len(texts), 1), 3), texts], 1)
    scores = log_softmax(read(model, params, rows[:, :-1]), axis=-1)
    total = np.take_along_axis(scores, rows[:, 1:, None], 2)[..., 0].sum(1)
    found = BeamSearch(Generator(model, 8, 16), 512).search(params, [Request([3], 4)])[0]
    assert found[0].ids == texts[total.argmax()].tolist()
    np.testing.assert_allclose([h.score * 4 for h in found[:5]], np.sort(total)[::-1][:5], atol=1e-4)


@pytest.mark.parity("torch", "transformers")
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "llama2",
                                  pytest.param("gemma2", marks=pytest.mark.slow)])
def test_greedy_and_beams_are_those_of_transformers(name):
    import torch
    import transformers

    folder = golden(name)[0]
    _, model, _, params = opened(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    generator, prompts = Generator(model, 96, 96), [[5, 3, 40], [7, 8, 9, 10, 11]]
    for prompt in prompts:
        ask = lambda **k: theirs.generate(torch.tensor([prompt]), do_sample=False, pad_token_id=0, max_new_tokens=20,  # noqa: B023
                                          eos_token_id=11, bos_token_id=None, **k)[0, len(prompt):].tolist()  # noqa: B023
        request = Request(prompt, 20, GREEDY, stop=frozenset({11}))
        assert written(generator, params, [request])[0] == ask()
        for beams, penalty in ((3, 1.0), (4, 0.0), (2, 2.0)):
            best = BeamSearch(generator, beams, penalty).search(params, [request])[0][0].ids
            theirs_best = ask(num_beams=beams, length_penalty=penalty)
            assert best == (theirs_best[: theirs_best.index(11)] if 11 in theirs_best else theirs_best), (name, beams)


# ---- Text --------------------------------------------------------------------------------------------------------------------


def test_text_is_given_out_in_whole_characters_and_up_to_a_stop_string():
    tokenizer, text = ByteTokenizer(), "naïve 中文 END and more"
    for stop, expected in (((), text), (("END",), "naïve 中文 "), (("文", "END"), "naïve 中"), (("more!",), text)):
        shown, out = Text(tokenizer, stop), []
        for token in tokenizer.encode(text):
            out.append(shown.add(int(token)))
            assert "\ufffd" not in out[-1] and not any(s in "".join(out) for s in stop)
            if shown.stopped:
                break
        assert "".join(out) + shown.finish() == expected and shown.stopped == (expected != text)
