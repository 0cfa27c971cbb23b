"""Imported by a run (`--config.imports`): notes which rows each process makes; slows the data down, or lets them hang."""

import hashlib
import json
import os
import time

from jaxlm.data.loader import Batches

batch_of = Batches.batch


def batch(self, step, rows=None):
    time.sleep(float(os.environ.get("ROW_SLEEP", 0)))
    while step == int(os.environ.get("ROW_HANG", -1)):
        time.sleep(1)
    made = batch_of(self, step, rows)
    with open(os.path.join(os.environ["ROW_FOLDER"], os.environ.get("JAXLM_PROCESS_ID", "0")), "a") as out:
        for i, row in enumerate(range(self.batch_size) if rows is None else rows):
            digest = hashlib.sha256(b"".join(made[name][i].tobytes() for name in sorted(made))).hexdigest()
            out.write(json.dumps([step, int(row), digest]) + "\n")
    return made


Batches.batch = batch
