"""What a run's answers score, beside trivial answers to the same prompts: `jaxlm eval` first, then

    python benchmarks/text.py NAME WORKDIR [--split=test] [--note=TEXT]

-> benchmarks/results/<date>-NAME.json, with the run's config, seed and summary. Every score is computed anew here from
WORKDIR/predictions-<split>.jsonl; the trivial answers are made of the records.
"""

import argparse
import json
import pathlib
import re

from record import save

from jaxlm.config import flatten
from jaxlm.data.formats import open_stream
from jaxlm.data.sources import find_files
from jaxlm.evaluate.text_metrics import score
from jaxlm.train.restore import config_of_run

FIELDS = {"multi30k": {"source copied": lambda r: r["prompt"]},
          "scitldr": {"first sentence": lambda r: r["record"]["source"][0], "last sentence": lambda r: r["record"]["source"][-1],
                      "title of the paper": lambda r: r["record"]["title"]},
          "csl": {"first 20 characters": lambda r: r["prompt"][:20],
                  "first clause": lambda r: re.split("[,，。;；]", r["prompt"])[0]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result; begins with one of " + ", ".join(FIELDS))
    parser.add_argument("workdir")
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--note", default="", help="what one must know of the run")
    args = parser.parse_args()
    config, folder = config_of_run(args.workdir), pathlib.Path(args.workdir)
    lines = [json.loads(line) for line in (folder / f"predictions-{args.split}.jsonl").read_text().splitlines()]
    path = config.data.test_path if args.split == "test" else config.data.valid_path
    if path.endswith(".jsonl.gz"):  # the trivial answers need more of the record than the prompt
        with open_stream(find_files(config, path, "data.path")[0]) as source:
            records = [json.loads(line) for line in source]
        lines = [{**line, "record": record} for line, record in zip(lines, records, strict=True)]
    references = [line["references"] for line in lines]
    of = lambda answers: score(config.eval.text_metrics, answers, references)
    task = next(task for task in FIELDS if args.name.startswith(task))
    save(args.name, {
        "note": args.note, "split": args.split, "answers": len(lines), "seed": config.seed,
        "scores": of([line["answer"] for line in lines]),
        "trivial": {name: {key: value for key, value in of([answer(line) for line in lines]).items() if "signature" not in key}
                    for name, answer in FIELDS[task].items()},
        "samples": [{key: line[key] for key in ("prompt", "answer", "references")} for line in lines[:5]],
        "summary": json.loads((folder / "summary.json").read_text()), "config": {
            key: value for key, value in flatten(config).items() if key not in ("data.root", "data.store_dir")}})


if __name__ == "__main__":
    main()
