"""What a cleaning step is, and the registry of them.

A step of one document is a function `step(record) -> Record | Removed`, made by `build(options, context)` from its group of
keys (`config.prepare.<name>`). A step of the whole corpus (duplicates) makes a `Sketch` of each document instead
(`sketch.py`). Steps hold nothing from one document to the next, so any process may take any shard.
"""

import importlib
from collections import Counter
from typing import NamedTuple

from jaxlm.errors import UserError
from jaxlm.registry import Registry

STEPS = Registry("cleaning step", key="prepare.steps")  # of one document
CORPUS_STEPS = Registry("cleaning step", key="prepare.steps")  # of all documents together

FILES = ("unicode", "markup", "pii", "classical", "c4", "gopher", "length", "language", "duplicates", "decontamination")


class Removed(NamedTuple):
    """reason: of the rule, the same for all documents it removes. detail: what was found in this one."""

    reason: str
    detail: str = ""


class Context(NamedTuple):
    """What a step may use beside its options. counts: what it did that is neither keeping nor removing ("email": 3).
    folder: where files made for the whole run lie."""

    config: object
    folder: str
    counts: Counter


def register_all(config) -> None:
    """Those of this folder, and those of `config.imports`: a worker process has imported nothing yet."""
    for module in [*(f"jaxlm.data.cleaning.{file}" for file in FILES), *config.imports]:
        importlib.import_module(module)


def needed(module: str, step: str):
    """An import of a package that only one step needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"prepare.steps: {step!r} cannot import {module} ({error}); pip install 'jaxlm[data]'") from error
