"""WikiText-2, word level (Merity et al. 2016), from scratch: perplexity is comparable with published numbers on exactly these
tokens (vocabulary 33,278, `<eos>` at each line end).

    jaxlm train --config=configs/tasks/wikitext2_lm.py --config.data.root=../shared/data --workdir=runs/wikitext2
    jaxlm eval --workdir=runs/wikitext2 --split=test --config.eval.stride=32

Perplexity 112.8 on test (125.9 on validation, windows of 128 that do not overlap), still falling. An n-gram model (interpolated
Witten-Bell) has 288 on test, AWD-LSTM 65.6 after 750 epochs; this is 6.9. 45 minutes at the speed of two idle CPU cores (5,360
tokens/s); the run took 94 on two that other work shared.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config(arg)
    c.steps, c.batch_size, c.seq_len = 7000, 16, 128
    c.data.root = "../shared/data"
    c.data.path, c.data.valid_path = "wikitext-2/train.txt", "wikitext-2/valid.txt"
    c.data.test_path = "wikitext-2/test.txt"
    c.data.tokenizer, c.data.jitter = "word", True
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 4, 192, 3, 768
    c.model.feedforward, c.model.qk_norm, c.model.zero_init_proj, c.model.init_fan_in = "relu2", True, True, True
    c.model.dropout = 0.2
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.adam_lr_ratio = "muon", 0.02, 0.15
    c.schedule.name, c.schedule.warmup_steps, c.schedule.final_fraction = "linear", "2%", 0.0
    c.eval.every_steps, c.eval.batch_size = "10%", 32
    return c
