"""What `jaxlm eval` tells of a run beside the loss, by what its documents are: each module registers its own."""

import sys

from jaxlm.parallel.distributed import is_main
from jaxlm.registry import Registry

EVALUATIONS = Registry("evaluation", key="data.form")  # (run, split, workdir, say) -> {name: number or text}


def evaluate_examples(run, split: str, workdir: str) -> dict:
    """run: `jaxlm.train.restore.Run`; split: "valid", "test"; workdir: where files go, or empty: nowhere. {} where a form of
    documents has no evaluation of its own. Raises UserError."""
    from jaxlm.evaluate import answers  # noqa: F401  registers itself

    form = run.config.data.form
    return EVALUATIONS[form](run, split, workdir, say) if form in EVALUATIONS else {}


def say(line: str) -> None:
    if line and is_main():
        print(line, file=sys.stderr, flush=True)
