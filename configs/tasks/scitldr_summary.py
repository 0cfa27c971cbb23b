"""One-sentence summaries of abstracts (SciTLDR-A, Cachola et al. 2020), from scratch, on two CPU cores: about ten minutes, and
ROUGE 18.8 / 5.7 / 17.2 on test. That is below what needs no model: the first sentence has 31.3 / 12.3 / 25.0, the title 40.4 /
21.6 / 34.7. 1,992 examples teach a model that has read nothing else the form of a summary, not what to take from the text.

    jaxlm train --config=configs/tasks/scitldr_summary.py --workdir=runs/scitldr
    jaxlm eval --workdir=runs/scitldr --split=test

Data: `data.root`/scitldr/{train,dev,test}.jsonl.gz; "target" is a list, whose best counts. With `:decoder` a decoder alone, which
goes on from the abstract; with `:prefix` one that reads it both ways first.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.data.root = "../shared/data"
    c.data.path, c.data.valid_path, c.data.test_path = (f"scitldr/{name}.jsonl.gz" for name in ("train", "dev", "test"))
    c.data.form, c.data.prompt, c.data.target = "pair", "{source}", "{target}"
    c.data.tokenizer, c.data.bpe_vocab_size = "bpe", 4096
    c.steps, c.batch_size = 150, 16
    if arg in ("decoder", "prefix"):
        c.seq_len, c.objective.name, c.model.prefix_attention = 384, "next_token", arg == "prefix"
        c.data.prompt = "{source}\nTL;DR: "
    else:
        c.seq_len, c.data.source_len = 64, 320
        c.model.family, c.objective.name = "encoder_decoder", "seq2seq"
    c.objective.label_smoothing = 0.1
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 2, 128, 4
    c.model.feedforward, c.model.dropout = "relu2", 0.3
    c.model.qk_norm = c.model.zero_init_proj = True
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.adam_lr_ratio = "muon", 0.02, 0.3
    c.schedule.name, c.schedule.final_fraction = "linear", 0.0
    c.eval.text_metrics, c.eval.beams, c.eval.max_new_tokens = ("rouge",), 4, 48
    return c
