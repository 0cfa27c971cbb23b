"""What the tests of data share."""

import json
import pathlib

import pytest


def shared(*parts) -> pathlib.Path:
    """A file of `shared/data`, real texts and tokenizers, where a checkout has that folder beside or above it; else the test is
    skipped."""
    for parent in pathlib.Path(__file__).resolve().parents:
        if (found := parent.joinpath("shared", "data", *parts)).exists():
            return found
    pytest.skip("no shared/data beside this checkout")


def write(config, name, content):
    """The file becomes data.path."""
    path = pathlib.Path(config.data.root, name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config.data.path = name
    return path


def jsonl(*texts, **fields) -> str:
    return "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts)
