"""Titles of Chinese abstracts (CSL, Li et al. 2022; the 1,000 of title-dev.tsv to learn from), from scratch, on two CPU cores:
three minutes beside other work, answers included. ROUGE by characters on test 12.4 / 4.1 / 11.3, far below the first 20
characters' 35.6 / 25.0 / 31.6: 900 examples teach a model that has read nothing else how a title sounds, not what it is about.
By its loss it over-fits from step 125 on (7.02, then 7.44), but its titles get better: with 150 steps it had 3.4 / 1.0 / 3.3.

    jaxlm train --config=configs/tasks/csl_summary_zh.py --workdir=runs/csl
    jaxlm eval --workdir=runs/csl --split=test

Data: `data.root`/csl-zh/title-{dev,test}.tsv: what is asked for, abstract, title. Every tenth of title-dev.tsv is held out.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config(arg)
    c.data.root = "../shared/data"
    c.data.path, c.data.test_path, c.data.valid_every = "csl-zh/title-dev.tsv", "csl-zh/title-test.tsv", 10
    c.data.form, c.data.header, c.data.prompt, c.data.target = "pair", False, "{1}", "{2}"
    c.data.tokenizer, c.data.bpe_vocab_size = "bpe", 4096
    c.steps, c.batch_size, c.seq_len, c.data.source_len = 500, 16, 48, 240
    c.model.family, c.objective.name, c.objective.label_smoothing = "encoder_decoder", "seq2seq", 0.1
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 2, 128, 4
    c.model.feedforward, c.model.dropout = "relu2", 0.3
    c.model.qk_norm = c.model.zero_init_proj = True
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.adam_lr_ratio = "muon", 0.02, 0.3
    c.schedule.name, c.schedule.final_fraction = "linear", 0.0
    c.eval.text_metrics, c.eval.beams, c.eval.max_new_tokens = ("rouge_characters",), 4, 40
    return c
