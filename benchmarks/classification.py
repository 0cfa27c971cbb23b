"""A recipe of configs/tasks/ on its held-out text, for several seeds and their ensemble, and by cross-validation:

    python benchmarks/classification.py sst2_sentiment --split=test --root=../shared/data --workdir=runs/sst2 [--crossval=5]

Written to results/<date>-<recipe>.json. The same command again goes on where it stopped.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

from record import save

NUMBERS = ("accuracy", "auc_roc", "f1_macro", "log_loss")


def jaxlm(*args) -> str:
    return subprocess.run([sys.executable, "-m", "jaxlm.cli", *args], check=True, stdout=subprocess.PIPE, text=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crossval", type=int, default=0)
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--workdir", required=True)
    args = parser.parse_args()
    config, root = f"--config=configs/tasks/{args.recipe}.py", f"--config.data.root={args.root}"
    folders = [f"{args.workdir}/seed-{seed}" for seed in range(args.seeds)]
    for seed, folder in enumerate(folders):
        jaxlm("train", config, root, f"--workdir={folder}", f"--config.seed={seed}")
    found = json.loads(jaxlm("eval", f"--ensemble={','.join(folders)}", f"--split={args.split}", "--json"))
    seconds = [json.loads(pathlib.Path(folder, "summary.json").read_text())["elapsed_seconds"] for folder in folders]
    runs = [{"seed": seed, "train_seconds": took, **{name: of[name] for name in of if name != "run"}}
            for seed, (took, of) in enumerate(zip(seconds, found["members"], strict=True))]
    result = {"recipe": args.recipe, "split": args.split, "examples": found["examples"],
              "mean": {name: statistics.mean(run[name] for run in runs) for name in NUMBERS}, "runs": runs,
              "ensemble": {**{name: found[name] for name in NUMBERS}, "confusion_matrix": found["confusion_matrix"],
                           "expected_calibration_error": found["calibration"]["expected_calibration_error"]}}
    if args.crossval:
        folds = f"--workdir={args.workdir}/folds"
        result["crossval"] = json.loads(jaxlm("eval", config, root, f"--crossval={args.crossval}", folds, "--json"))
    save(args.recipe, result)


if __name__ == "__main__":
    main()
