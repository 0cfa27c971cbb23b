"""A tiny classification run: what a text is about is its first letter."""

import random

from configs import default
from jaxlm.config import resolve
from jaxlm.validation import validate

CLASSES = ("a", "b")


def write_rows(file, count: int, classes=CLASSES, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        name = classes[i % len(classes)]
        rows.append(f"{name}{''.join(rng.choices('xyz', k=rng.randint(1, 9)))}\t{name}")
    file.write_text("\n".join(rows) + "\n")


def classified(tmp_path, classes=CLASSES, **keys):
    """-> config on tmp_path/train.tsv, and valid.tsv, as configs/tasks/ have it. keys: "optimizer__learning_rate"."""
    c = default.get_config()
    c.steps, c.batch_size, c.seq_len = 6, 8, 24
    c.data.path, c.data.valid_path = str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv")
    c.data.store_dir = str(tmp_path / "stores")
    c.data.form, c.data.header, c.data.text_field, c.data.label_field, c.data.classes = "label", False, "0", "1", classes
    c.data.tokenizer = "byte"
    c.objective.name, c.model.family, c.model.pooling = "classification", "encoder", "mean"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 16, 2
    c.schedule.name, c.schedule.warmup_steps, c.optimizer.learning_rate = "constant", 0, 1e-2
    c.observe.progress, c.observe.report = "none", False
    c.checkpoint.every_steps, c.eval.every_steps = 0, 0
    c.unlock()
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in keys.items()})
    c.lock()
    resolve(c)
    validate(c)
    return c
