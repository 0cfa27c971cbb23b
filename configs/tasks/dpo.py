"""Which of two answers is better: direct preference optimisation (DPO), starting from a model that answers already.

    jaxlm train --config=configs/tasks/dpo.py --config.model.from_pretrained=my-chat-model --workdir=runs/dpo  # a folder
    jaxlm train --config=configs/tasks/dpo.py:scratch --config.model.from_pretrained=runs/sft --workdir=runs/dpo

Of the small model (250 pairs, one epoch of 56 steps): validation loss 0.663 nats per pair (0.693 at the start), 60 % of 50
held-out pairs the right way round (chance is 50 %, give or take 7), in a minute on 2 CPU cores that other work shared; after 30
steps, half an epoch, 0.672 and 58 %. Of 147 pairs alone, those whose prompt fits half a row, it had 0.641 and 70 % of 33; there,
with learning rate 1e-4 and two epochs, it over-fits from step 24 on (0.612, then 0.668) and its answers fall to pieces.
"""

from configs import default
from configs.tasks import chat_sft


def get_config(arg: str = ""):
    c = default.get_config()
    if arg == "scratch":  # the small model of chat_sft.py:scratch
        c.model = chat_sft.get_config("scratch").model
    c.objective.name, c.objective.beta = "dpo", 0.1
    c.data.form = "preference"
    c.data.root = "../shared/data"
    c.data.path = "preference/dpo_en_demo.jsonl"
    c.data.valid_every = 6
    c.data.on_error = "skip"
    c.steps, c.batch_size, c.seq_len = 60, 8, 2048
    c.optimizer.learning_rate, c.optimizer.weight_decay = 5e-7, 0.0
    c.checkpoint.every_steps, c.checkpoint.keep_best = "20%", True
    c.schedule.warmup_steps, c.eval.every_steps, c.observe.log_every = "10%", "20%", 1
    if arg == "scratch":
        c.steps, c.batch_size, c.seq_len, c.optimizer.learning_rate = 56, 4, 1024, 2e-5
    return c
