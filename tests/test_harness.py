"""lm-eval in this process: its own scores with transformers are those of jaxlm's model, for each log-likelihood and each measure.

Without lm-eval these tests are skipped; what it answers to the same texts is also stored, and compared in test_scoring and
test_tasks.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import HASTY
from lm_eval_cases import MODELS, RECORDS, by_lm_eval, golden, write_model, write_tasks
from test_scoring import opened

from jaxlm.data.chat import ChatTemplate
from jaxlm.errors import UserError

pytestmark = pytest.mark.parity
WITHIN = 1e-6  # relative, of log-likelihoods in float32


@pytest.fixture(scope="module")
def harness():
    """The module; lm-eval and datasets are kept from the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        pytest.importorskip("lm_eval")
        from jaxlm.evaluate import harness

        yield harness


@pytest.mark.parametrize("name, chat", [("gpt2", False), ("llama2", True)])  # test_each_answer_... has the other two
def test_lm_eval_measures_the_same_as_with_transformers(harness, name, chat, tmp_path):
    write_tasks(tmp_path)
    tasks = harness.Harness(list(RECORDS), str(tmp_path), 0, chat)
    evaluator, params = opened(name)
    for _ in range(1 if chat else 2):  # as at each evaluation of a run
        results = tasks.run(evaluator, params)
    for task, of in golden(name, chat)[1].items():
        for key, value in of["results"].items():
            if key != "perplexity_stderr,none":  # of another number of resamples
                assert results[task][harness.measure(key)] == pytest.approx(value, rel=3e-6), (task, key)
        assert results[task]["n"] == len(RECORDS[task])
    assert [results[task]["cut"] for task in RECORDS] == [2, 1, 0, 0]
    if not chat:
        assert harness.Harness(["tiny_word"], str(tmp_path), 2).run(evaluator, params)["tiny_word"]["n"] == 2


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_answer_of_the_adapter_is_that_of_transformers(harness, name, chat):
    evaluator, params = opened(name)
    model = harness.JaxLM(evaluator, params)
    compare(model, golden(name, chat)[1])


def test_the_chat_template_writes_a_question_and_an_answer_that_is_begun(harness):
    model = harness.JaxLM(*opened("llama2"))
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who? "}]
    assert model.apply_chat_template(turns) == "<s>answer: be brief\nquestion: who?\nanswer:"
    begun = [*turns[1:], {"role": "assistant", "content": "the "}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "<s>question: who?\nanswer: the"
    model.template = ChatTemplate("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
                                  "{{ m.content }}{% endfor %}", {})
    assert model.apply_chat_template(turns) == "who? "
    with pytest.raises(UserError, match="at least one message"):
        model.apply_chat_template([{"role": "system", "content": "x"}])


def compare(model, answers: dict) -> float:
    """Each answer of a `JaxLM` with lm-eval's -> the largest relative difference of a log-likelihood."""
    from lm_eval.api.instance import Instance

    kinds = {"tiny_choice": "loglikelihood", "tiny_word": "loglikelihood", "tiny_text": "loglikelihood_rolling",
             "tiny_sums": "generate_until"}
    worst = 0.0
    for task, kind in kinds.items():
        samples = answers[task]["samples"]
        requests = [Instance(kind, {}, tuple(arguments), i, (task, i, 1)) for i, (arguments, _) in enumerate(samples)]
        for got, (arguments, wanted) in zip(getattr(model, kind)(requests), samples, strict=True):
            if kind == "generate_until":
                assert got == wanted, arguments
                continue
            number, right = (got, wanted) if kind == "loglikelihood_rolling" else (got[0], wanted[0])
            worst = max(worst, abs(number - right) / abs(right))
            assert kind == "loglikelihood_rolling" or got[1] == wanted[1], arguments
    assert worst < WITHIN
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_lm_eval_with_transformers_answers_the_same_now(harness, name, capsys):
    """The stored answers are made anew: lm-eval's HFLM and jaxlm's adapter with the same weights."""
    pytest.importorskip("transformers")
    from lm_eval_cases import GOLDEN

    evaluator, params = opened(name)
    live = by_lm_eval(write_model(name, json.loads(GOLDEN.read_text())["tokenizer"]))
    worst = compare(harness.JaxLM(evaluator, params), live)
    with capsys.disabled():
        print(f"\n{name}: log-likelihoods differ by at most {worst:.1e} of themselves")


def test_options_of_generation(harness):
    sampling = harness.Sampling
    assert harness.generation_options({"until": "x"}) == (("x",), 256, sampling(temperature=0.0))
    greedy = {"until": ["a", "b"], "max_tokens": 5, "max_gen_toks": 7, "do_sample": False, "temperature": 0.7}
    assert harness.generation_options(greedy) == (("a", "b"), 7, sampling(temperature=0.0))
    assert harness.generation_options({"temperature": 0.7, "top_p": 0.9}) == ((), 256, sampling(temperature=0.7, top_p=0.9))
    with pytest.raises(UserError, match="generation_kwargs num_beams: jaxlm has no such option"):
        harness.generation_options({"num_beams": 4})


def test_what_lm_eval_cannot_do_is_one_line(harness, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "broken.yaml").write_text(
        "task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: /nowhere.jsonl}}\n")
    for names, path, said in ((["tiny_word"], str(tmp_path / "no"), "no such folder"),
                              (["broken"], str(tmp_path), "eval.lm_eval=broken: lm-eval cannot load it .*must be in reach")):
        with pytest.raises(UserError, match=said):
            harness.Harness(names, path, 0)
    assert "tiny_word" in harness.near("tiny_wrd", ["a", "tiny_word"])


def test_without_lm_eval_the_extra_is_named():
    code = "import sys; sys.modules['lm_eval'] = None\nfrom jaxlm.errors import UserError\n" \
           "try:\n    import jaxlm.evaluate.harness\nexcept UserError as error:\n    print(error)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install 'jaxlm[lm-eval]'" in out.stdout, out.stderr


def test_eval_asks_lm_eval_on_the_command_line(harness, tmp_path, capsys):
    from jaxlm.cli import main

    files = write_tasks(tmp_path)
    arguments = [f"--config.model.from_pretrained={golden('gpt2')[0]}", "--config.mesh.data=1", "--config.eval.batch_size=8"]
    assert main(["eval", *arguments, f"--tasks=mine=lambada:{files['tiny_word']}", "--lm_eval=tiny_word",
                 f"--lm_eval_path={tmp_path}", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["tasks"]  # alone: nothing that lm-eval prints is between
    assert results["mine"]["perplexity"] == pytest.approx(results["tiny_word"]["perplexity"], rel=1e-6)
    assert main(["eval", *arguments, f"--lm_eval_path={tmp_path}"]) == 2 and "is for --lm_eval" in capsys.readouterr().err


def test_two_processes_answer_together(harness, tmp_path):
    """Each has its part of the rows; the measures are those of one process, and one of them tells."""
    from jaxlm.parallel.peers import free_port

    write_tasks(tmp_path)
    (folder, answers), tasks = golden("gpt2"), ("tiny_choice", "tiny_sums")
    command = [sys.executable, "-m", "jaxlm.cli", "eval", f"--config.model.from_pretrained={folder}", "--config.mesh.data=2",
               f"--lm_eval={','.join(tasks)}", f"--lm_eval_path={tmp_path}", "--config.eval.batch_size=8", "--json"]
    env = {**os.environ, "XLA_FLAGS": HASTY, "JAXLM_COORDINATOR": f"127.0.0.1:{free_port()}", "JAXLM_NUM_PROCESSES": "2"}
    started = [subprocess.Popen(command, env={**env, "JAXLM_PROCESS_ID": str(i)}, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE) for i in range(2)]
    (out, err), (silent, _) = (process.communicate(timeout=240) for process in started)
    assert [process.returncode for process in started] == [0, 0], err
    found = json.loads(out.splitlines()[-1])["tasks"]
    for task in tasks:
        assert found[task]["n"] == len(RECORDS[task])
        for key, value in answers[task]["results"].items():
            assert found[task][harness.measure(key)] == pytest.approx(value, rel=3e-6), (task, key)
    assert "{" not in silent
