"""The content of an artifact as plain mappings, one after another, for `bessemer cat`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from storage.record import Record

SPLITS: tuple[Literal["train", "held"], ...] = ("train", "held")


def lines(record: Record, path: Path, *, is_dropped: bool) -> Iterator[dict[str, Any]]:
    """Documents, conversations, pairs, scores, decoded tokens, or the files of anything else.

    Raises ValueError where dropped documents are asked of something that drops none.
    """
    if is_dropped and record.kind != "corpus":
        raise ValueError(
            f"{record.stage} makes a {record.kind}, which drops no documents; name a node such as "
            "filter, dedup or decontaminate"
        )
    match record.kind:
        case "corpus":
            yield from _documents(path, is_dropped=is_dropped)
        case "tokens":
            yield from _decoded(path)
        case "conversations" | "preferences":
            for split in SPLITS:
                yield from _json_lines(path / "files" / f"{split}.jsonl", split)
        case "scores":
            yield from _scores(path)
        case "tokenizer":
            yield from _vocabulary(path)
        case _:
            for file in record.files:
                yield {"file": file.name, "bytes": file.size, "xxh3": file.xxh3}


def _documents(path: Path, *, is_dropped: bool) -> Iterator[dict[str, Any]]:
    from storage.corpus import Corpus

    corpus = Corpus(path)
    return corpus.dropped() if is_dropped else corpus.documents()


def _decoded(path: Path) -> Iterator[dict[str, Any]]:
    from storage.tokens import Tokens

    reader = Tokens(path).reader
    for domain in reader.domains:
        for split in SPLITS:
            ids, start = reader.tokens(domain, split), 0
            for end in reader.ends(domain, split):
                document = ids[start : int(end)].tolist()
                text = reader.tokenizer.decode(document)
                yield {"domain": domain, "split": split, "tokens": len(document), "text": text}
                start = int(end)


def _scores(path: Path) -> Iterator[dict[str, Any]]:
    from storage.scores import Scores

    scores = Scores(path)
    for name, figure in scores.figures().items():
        yield {"figure": name, **figure.model_dump()}
    yield from scores.answers()


def _vocabulary(path: Path) -> Iterator[dict[str, Any]]:
    from storage.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(path / "files")
    for token in range(tokenizer.vocabulary):
        yield {"id": token, "text": tokenizer.decode([token], keep_special=True)}


def _json_lines(file: Path, split: str) -> Iterator[dict[str, Any]]:
    if file.is_file():
        with file.open(encoding="utf-8") as stream:
            for line in stream:
                yield {"split": split, **json.loads(line)}
