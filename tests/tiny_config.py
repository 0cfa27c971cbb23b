"""A config of a tiny model, by the keys that differ from the default."""

from configs import default
from jaxlm.config import resolve
from jaxlm.validation import validate


def make_config(**model):
    config = default.get_config()
    config.seq_len = 112
    config.model.update(model)
    resolve(config)
    validate(config)
    return config
