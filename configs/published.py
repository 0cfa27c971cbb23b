"""Any of the published sizes (`jaxlm/models/families/sizes.py`), by its name; without one, Qwen 3 0.6B.

    jaxlm train --config=configs/published.py:qwen3_8b --config.data.path=corpus.jsonl --config.data.tokenizer=tokenizer.json
"""

from configs import default
from jaxlm.config import layer_period
from jaxlm.errors import UserError
from jaxlm.models.families import apply, read_config
from jaxlm.models.families.sizes import SIZES
from jaxlm.registry import did_you_mean


def get_config(arg: str = ""):
    c = default.get_config()
    name = "qwen3_0_6b" if arg in ("", "debug") else arg
    if name not in SIZES:
        raise UserError(f"configs/published.py:{name}: unknown size; {did_you_mean(name, SIZES)}")
    apply(c, read_config(SIZES[name])[1])
    c.steps = 50_000
    c.batch_size = 256
    c.model.compute_dtype = "bfloat16"
    c.model.scan_layers = c.model.num_layers % layer_period(c.model) == 0
    c.model.remat = "full"
    c.data.tokenizer = "tokenizer.json"
    c.data.isolate_documents = True
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return default.debug(c) if arg == "debug" else c
