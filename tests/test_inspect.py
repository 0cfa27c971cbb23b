"""jaxlm data: what a run saw at a step is what its batch was; a store made ahead is the run's."""

import json

import numpy as np
from data_cases import jsonl, write

from jaxlm.cli import main
from jaxlm.data.inspect import as_text, inspect
from jaxlm.data.loader import build_data


def keys(config, **more):
    values = {"data.path": config.data.path, "data.root": config.data.root, "data.store_dir": config.data.store_dir,
              "seq_len": 12, "batch_size": 4, "data.tokenizer": "byte", "data.isolate_documents": True, **more}
    return [f"--config.{key}={value}" for key, value in values.items()]


def test_it_is_the_batch_of_that_step_with_borders_and_masks(config, capsys):
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(3 + i % 9)) for i in range(60)]
    write(config, "a.jsonl", jsonl(*texts))
    seen = inspect("", "configs/default.py", 3, 2, keys(config))
    config.seq_len, config.batch_size, config.data.tokenizer, config.data.isolate_documents = 12, 4, "byte", True
    batch = build_data(config).train.batch(2)
    for row in (0, 1):
        for name, array in batch.items():
            np.testing.assert_array_equal(seen["rows"][row][name], array[row])
        parts = seen["rows"][row]["pieces"]
        whole = build_data(config).tokenizer.decode([batch["tokens"][row, 0], *batch["targets"][row]])
        assert "".join(p["text"] for p in parts) == whole
        assert sum(p["kind"] == "border" for p in parts) == len(set(batch["segment_ids"][row].tolist())) - 1 + (
            batch["loss_mask"][row, -1] == 0)
    text = as_text(seen)
    assert text.startswith("step 3, epoch 0: 2 of 4 rows") and "-" * 40 in text and "[[" in text
    assert main(["data", "inspect", "--config=configs/default.py", "--step=3", "--rows=2", *keys(config)]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_masked_targets_are_in_brackets_and_documents_apart(config):
    write(config, "a.jsonl", jsonl("abcd", "efgh", "ijkl", "mnop", "qrst", "uvwx"))
    seen = inspect("", "configs/default.py", 1, 1, keys(config, **{"data.shuffle": False}))
    assert as_text(seen).splitlines()[2:] == ["=== row 0 (row 0 of the data): 10 targets, 3 documents ===", "[[a]]bcd",
                                              "-" * 40, "[[e]]fgh", "-" * 40, "[[i]]jk"]


def test_build_makes_the_store_that_a_run_opens(config, capsys, monkeypatch):
    write(config, "a.jsonl", jsonl("abcd", "efgh", "ijkl", "mnop"))
    assert main(["data", "build", "--config=configs/default.py", *keys(config)]) == 0
    assert "train: 15 tokens, 3 documents\nvalid: 5 tokens, 1 documents" in capsys.readouterr().out
    config.data.tokenizer = "byte"
    monkeypatch.setattr("jaxlm.data.store.build_store", lambda *a: 1 / 0)
    build_data(config)


def test_what_cannot_be_shown_is_said(config, capsys):
    write(config, "a.jsonl", jsonl("abcd", "efgh", "ijkl", "mnop"))
    for arguments, message in ((["--step=0"], "--step must be at least 1"), (["--step=5000"], "the run has 1000 steps")):
        assert main(["data", "inspect", "--config=configs/default.py", *arguments, *keys(config)]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "inspect", "--step=1"]) == 2 and "give one of --workdir" in capsys.readouterr().err


def test_a_changed_text_is_not_shown_as_what_the_run_saw(config, tmp_path, capsys):
    path = write(config, "a.jsonl", jsonl("abcd", "efgh", "ijkl", "mnop"))
    config.data.tokenizer = "byte"
    (tmp_path / "run").mkdir()
    stored = {"config": json.loads(config.to_json()), "data": build_data(config).fingerprint}
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    command = ["data", "inspect", f"--workdir={tmp_path / 'run'}", "--step=1"]
    assert main(command) == 0
    path.write_text(jsonl("abcd", "efgh", "ijkl", "mnoP"))
    assert main(command) == 2 and "its text is no longer what it was" in capsys.readouterr().err
