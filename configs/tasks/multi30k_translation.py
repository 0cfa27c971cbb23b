"""German to English (Multi30k, Elliott et al. 2016), from scratch."""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config(arg)
    c.steps, c.batch_size, c.seq_len = 3000, 16, 128
    c.data.path, c.data.valid_path = "multi30k-en-de/train", "multi30k-en-de/val"
    c.data.test_path = "multi30k-en-de/test_2016_flickr"
    c.data.root = "../shared/data"
    c.data.form, c.data.parallel, c.data.prompt, c.data.target = "pair", ("de", "en"), "{de}", "{en}"
    c.data.tokenizer, c.data.bpe_vocab_size = "bpe", 8192
    c.objective.name, c.objective.label_smoothing = "seq2seq", 0.1
    c.model.family = "encoder_decoder"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 3, 256, 4
    c.model.mlp_dim = 512
    c.model.dropout = 0.1
    c.optimizer.learning_rate = 1e-3
    c.eval.every_steps = "10%"
    return c
