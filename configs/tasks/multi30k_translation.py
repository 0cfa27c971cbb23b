"""German to English (Multi30k, Elliott et al. 2016), from scratch, on two CPU cores: 22 minutes of CPU time (29 minutes on busy
cores) to a sacreBLEU of 40.8 on test 2016 (41.0 lower-cased), beam search of 5, which takes half a minute.

    jaxlm train --config=configs/tasks/multi30k_translation.py --workdir=runs/multi30k
    jaxlm eval --workdir=runs/multi30k --split=test
    jaxlm generate --workdir=runs/multi30k --beams=5 --prompt="Ein Hund rennt durch den Schnee."

Data: `data.root`/multi30k-en-de/{train,val,test_2016_flickr}.{de,en}, a sentence a line.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config(arg)
    c.steps, c.batch_size, c.seq_len = 860, 16, 128
    c.data.root = "../shared/data"
    c.data.path, c.data.valid_path = "multi30k-en-de/train", "multi30k-en-de/val"
    c.data.test_path = "multi30k-en-de/test_2016_flickr"
    c.data.form, c.data.parallel, c.data.prompt, c.data.target = "pair", ("de", "en"), "{de}", "{en}"
    c.data.tokenizer, c.data.bpe_vocab_size = "bpe", 4096
    c.objective.name, c.objective.label_smoothing = "seq2seq", 0.1
    c.model.family = "encoder_decoder"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 3, 256, 4
    c.model.mlp_dim, c.model.feedforward = 512, "relu2"
    c.model.qk_norm = c.model.zero_init_proj = True
    c.model.dropout = 0.05
    c.optimizer.name, c.optimizer.muon_steps = "muon", 4
    c.optimizer.learning_rate, c.optimizer.adam_lr_ratio = 0.02, 0.3
    c.schedule.name, c.schedule.warmup_steps, c.schedule.decay_steps, c.schedule.final_fraction = "wsd", 10, "40%", 0.0
    c.eval.every_steps = "10%"
    c.eval.text_metrics, c.eval.beams, c.eval.max_new_tokens = ("bleu", "bleu_lowercase", "chrf"), 5, 100
    return c
