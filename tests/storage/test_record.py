"""A record survives its file, and says no to what it does not know."""

import pytest
from pydantic import ValidationError

from storage.record import FileEntry, InputEntry, Record


def test_a_record_reads_back_as_it_was() -> None:
    record = Record(
        fingerprint="f",
        kind="corpus",
        stage="dedup",
        digest="d",
        identity={"settings": {"threshold": 0.8}},
        inputs={
            "corpus": InputEntry(fingerprint="a", digest="b"),
            "corpora": {"中": InputEntry(fingerprint="c", digest="d")},
        },
        files=[FileEntry(name="目录/a.txt", size=3, xxh3="0")],
        metrics={"kept": 3},
    )
    assert Record.model_validate_json(record.model_dump_json()) == record


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="surprise"):
        Record.model_validate(
            {
                "fingerprint": "f",
                "kind": "k",
                "stage": "s",
                "digest": "",
                "identity": {},
                "surprise": 1,
            }
        )
