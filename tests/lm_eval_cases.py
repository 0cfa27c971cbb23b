"""Tiny tasks, and what lm-eval makes of them with tiny random models run by transformers.

`golden` needs neither lm-eval nor torch: tests/golden/lm_eval.json holds the tokenizer, and each text that lm-eval asked about
with the answer it got. `python tests/lm_eval_cases.py` writes it anew, where lm-eval, transformers and torch are.
"""

import functools
import json
import os
import pathlib
import tempfile

from hf_models import CONFIGS, write_folder

GOLDEN = pathlib.Path(__file__).parent / "golden" / "lm_eval.json"
MODELS = {"gpt2": None, "llama2": "<s>"}  # the token that its texts begin with
CHAT = ("{{ bos_token }}{% for m in messages %}{{ 'question: ' if m.role == 'user' else 'answer: ' }}{{ m.content | trim }}"
        "{{ eos_token if m.role == 'assistant' else '' }}{{ '\\n' }}{% endfor %}{{ 'answer:' if add_generation_prompt else '' }}")
SPECIAL = ["<|endoftext|>", "<s>", "</s>"]  # ids 0, 1, 2
STORY = ("question: which animal can fly over the river? answer: the bird flies over the river, and the cat sleeps under the "
         "café. the old man went to the river; he saw 12 birds and 30 cats there. #### 42 a dog likes to run in the green "
         "garden. ")
QUESTIONS = [  # (query, choices, gold), by which acc, acc_norm and acc_bytes are not the same
    ("question: which animal can fly?\nanswer:", ["the bird", "the cat", "a dog in the garden", "café"], 3),
    ("question: where is the man?  ", ["at the river", "in the café, he is", "the old man went", "under"], 2),
    ("", ["the cat sleeps", "the bird flies over the river", "42"], 2),
    (STORY + STORY + "question: how many cats?\nanswer:", ["30", "12 birds and 30 cats there"], 1),  # longer than the context
    ("the old man", ["went to the river; he saw", "saw", "a green dog"], 0),
    ("café café", ["café", "cafe", "ée"], 0),
    ("the café", ["éééé", "the cat", "to run", "under", "an ééééé"], 0),
    ("he saw", ["é é", "cats", "over it", "ééé"], 3),
]
PASSAGES = ["the old man went to the river", "a dog likes to run in the green garden", "he saw 12 birds and 30 cats there",
            "the bird flies over the river, and the cat sleeps under the café", STORY + STORY + "the cat sleeps"]
WORDS = STORY.split()
# Two longer than the context, no end of one window like another's: HFLM looks answers up by their last tokens, and mixes up
# windows of one batch that end alike but are scored from different places on.
DOCUMENTS = ["a dog", "the bird flies over the river", " ".join(WORDS[7 * i % len(WORDS)] for i in range(90)), STORY]
SUMS = [("how many cats are there?", "12 cats and 30 more.\n#### 42"), ("which bird?", "there is 1.\n#### 1")]
YAML = {
    "tiny_choice": """output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - metric: acc
  - metric: acc_norm
  - metric: acc_bytes
""",
    "tiny_word": """output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
  - metric: acc
""",
    "tiny_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "tiny_sums": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["#", "zq"]
  do_sample: false
  max_gen_toks: 24
metric_list:
  - metric: exact_match
""",
}
RECORDS = {
    "tiny_choice": [dict(query=q, choices=c, gold=g) for q, c, g in QUESTIONS],
    "tiny_word": [dict(text=text) for text in PASSAGES],
    "tiny_text": [dict(text=text) for text in DOCUMENTS],
    "tiny_sums": [dict(question=q, answer=a) for q, a in SUMS],
}


def write_tasks(folder) -> dict[str, str]:
    """Task files of lm-eval in `folder`, with their data -> {task: its data file}."""
    files = {}
    for name, records in RECORDS.items():
        files[name] = str(pathlib.Path(folder, name + ".jsonl"))
        pathlib.Path(files[name]).write_text("".join(json.dumps(record) + "\n" for record in records))
        pathlib.Path(folder, name + ".yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {files[name]}}}\ntest_split: test\n"
            + YAML[name])
    return files


def write_model(name: str, tokenizer: str) -> str:
    """A Hugging Face folder with weights from numpy, and a tokenizer.json in which texts begin as the model's do."""
    folder = write_folder(json.loads(CONFIGS.read_text())[name])
    tokenizer, first = json.loads(tokenizer), MODELS[name]
    if first:
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {first: {"id": first, "ids": [SPECIAL.index(first)], "tokens": [first]}}}
    pathlib.Path(folder, "tokenizer.json").write_text(json.dumps(tokenizer))
    end = "</s>" if first else SPECIAL[0]
    pathlib.Path(folder, "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": first or end, "eos_token": end, "chat_template": CHAT}))
    return folder


@functools.cache
def golden(name: str, chat: bool = False) -> tuple[str, dict]:
    """-> (folder of the model, {task: {"results": lm-eval's, "samples": [[arguments, answer], ...]}}). chat: asked through the
    chat template."""
    stored = json.loads(GOLDEN.read_text())
    return write_model(name, stored["tokenizer"]), stored["chat_answers" if chat else "answers"][name]


def train_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [STORY, *(text for question, choices, _ in QUESTIONS for text in (question, *choices)), "\n"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=96, special_tokens=SPECIAL, show_progress=False))
    return tokenizer.to_str()


def by_lm_eval(folder: str, chat: bool = False) -> dict:
    """All tasks, asked of transformers' model by lm-eval itself; chat: through the chat template."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DISABLE_MULTIPROC": "1"}
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as tasks:
        write_tasks(tasks)
        found = simple_evaluate(model=HFLM(pretrained=folder, device="cpu", batch_size=4, dtype="float32"), tasks=list(RECORDS),
                                task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=100,
                                apply_chat_template=chat, fewshot_as_multiturn=chat)
    answers = {}
    for name in RECORDS:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        results = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
        answers[name] = {"results": results, "samples": [
            [list(arguments), response] for sample in samples
            for arguments, (response, *_) in zip(sample["arguments"], sample["resps"], strict=True)]}
    return answers


if __name__ == "__main__":
    tokenizer = train_tokenizer()
    answers = {key: {name: by_lm_eval(write_model(name, tokenizer), chat) for name in MODELS}
               for key, chat in (("answers", False), ("chat_answers", True))}
    GOLDEN.write_text(json.dumps({"tokenizer": tokenizer, **answers}, indent=1, ensure_ascii=False) + "\n")
