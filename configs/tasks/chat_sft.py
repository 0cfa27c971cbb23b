"""Answers to instructions: supervised fine-tuning on conversations, with the loss on the answers alone.

    jaxlm train --config=configs/tasks/chat_sft.py --config.model.from_pretrained=Qwen3-0.6B --workdir=runs/sft
    jaxlm train --config=configs/tasks/chat_sft.py:scratch --workdir=runs/sft    # a small model of its own, to see it work
    jaxlm chat --workdir=runs/sft

Of the small model (2.6 M parameters, 3,251 conversations, 2 M tokens): validation loss 4.02 nats per token, 1.54 bits per byte,
in 20 minutes on a share of 2 busy CPU cores. It answers in English words and in lists, and makes no sense: it has seen no other
text.
"""

from configs import default


def get_config(arg: str = ""):
    c = default.get_config()
    c.data.form = "chat"
    c.data.root = "../shared/data"
    c.data.path = ",".join(f"instruct/{name}.jsonl.gz" for name in ("alpaca_en_demo", "gpteacher_roleplay", "messages_demo"))
    c.data.valid_every = 20
    c.steps, c.batch_size, c.seq_len = 400, 16, 1024
    c.optimizer.learning_rate, c.optimizer.weight_decay = 2e-5, 0.0
    c.schedule.warmup_steps = "5%"
    if arg == "scratch":
        c.steps, c.batch_size, c.seq_len = 500, 8, 512
        c.data.tokenizer, c.data.bpe_vocab_size = "bpe", 4096
        c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 4, 192, 3, 512
        c.model.qk_norm = True
        c.optimizer.name, c.optimizer.learning_rate, c.optimizer.weight_decay = "muon", 0.02, 0.1
        c.eval.every_steps = "20%"
    return default.debug(c) if arg == "debug" else c
