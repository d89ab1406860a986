"""Token files say what they hold, are mapped, and refuse to be read when cut short."""

from pathlib import Path

import numpy as np
import pytest

from storage.tokens import (
    SplitCount,
    TokenFiles,
    TokensMeta,
    difficulty_path,
    end_path,
    token_path,
    write_meta,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # web.train: documents [5 6 1] and [7 1]; web.held: nothing
    token_path(tmp_path, "web", "train").write_bytes(bytes([5, 0, 6, 0, 1, 0, 7, 0, 1, 0]))
    end_path(tmp_path, "web", "train").write_bytes(bytes([3] + [0] * 7 + [5] + [0] * 7))
    for path in (token_path(tmp_path, "web", "held"), end_path(tmp_path, "web", "held")):
        path.write_bytes(b"")
    (tmp_path / "web.held.bytes").write_bytes(b"")
    domains = {"web": {"train": SplitCount(tokens=5, documents=2, bytes=9), "held": SplitCount()}}
    meta = TokensMeta(eos=1, vocabulary=300, tokenizer_digest="d", domains=domains)
    write_meta(tmp_path, meta)
    return tmp_path


def test_documents_are_read_by_hand(folder: Path) -> None:
    files = TokenFiles(folder)
    tokens, ends = files.tokens("web", "train"), files.ends("web", "train")
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == [5, 6, 1, 7, 1]
    assert ends.tolist() == [3, 5]
    assert tokens[ends[0] : ends[1]].tolist() == [7, 1]
    assert files.count("web", "train").bytes == 9
    assert files.domains == ["web"]


def test_an_empty_split_is_empty_arrays(folder: Path) -> None:
    files = TokenFiles(folder)
    assert files.tokens("web", "held").shape == (0,)
    assert files.ends("web", "held").shape == (0,)
    assert files.text_bytes("web").shape == (0,)


def test_a_file_cut_short_is_refused(folder: Path) -> None:
    path = token_path(folder, "web", "train")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"has 8 bytes, meta\.json counts 5 x 2"):
        TokenFiles(folder)


def test_an_unknown_domain_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="no domain 'books'"):
        TokenFiles(folder).tokens("books", "train")


def test_a_difficulty_column_has_a_value_for_each_training_document(folder: Path) -> None:
    np.save(difficulty_path(folder, "web", "length"), np.array([3, 2], np.float32))
    np.save(difficulty_path(folder, "web", "rarity"), np.array([3, 2, 1], np.float32))
    files = TokenFiles(folder)
    assert files.difficulty("web", "length").tolist() == [3, 2]
    with pytest.raises(ValueError, match=r"'depth' .*only \['length', 'rarity'\]; name it in"):
        files.difficulty("web", "depth")
    with pytest.raises(ValueError, match=r"holds float32 \(3,\), .* counts 2 documents"):
        files.difficulty("web", "rarity")
