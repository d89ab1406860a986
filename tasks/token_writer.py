"""Turns the documents of one shard into token files, the fast way where it gives the same ids."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from storage.corpus import Shard
from storage.tokenizer import MODEL_FILE, SPECIAL_TOKENS, ChatTokenizer
from storage.tokens import (
    BYTES,
    END,
    SPLITS,
    TOKEN,
    Split,
    SplitCount,
    bytes_path,
    end_path,
    token_path,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

    Encoded = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
    Encode = Callable[[Sequence[str]], Encoded]
    """Ids of all texts after one another, and where each text's end."""

BATCH_BYTES = 8_000_000
CHECKED_DOCUMENTS = 64
CHECKED_CHARS = 3_000

DOMAIN_NAME = re.compile(r"\w[\w.-]*")


def build_shard(files: Path, shard: Shard, tokenizer: Path, engine: str) -> dict[str, Any]:
    """Write the token files of a shard's kept documents, in order of rows.

    Returns counts per domain and split, and per language. Raises ValueError for a domain that cannot
    name a file.
    """
    frame = shard.read(["domain", "split", "language", "text"])
    chat = ChatTokenizer(tokenizer)
    samples = frame["text"].gather_every(max(1, frame.height // CHECKED_DOCUMENTS)).to_list()
    encode, engine = choose_encoder(chat, tokenizer, samples, engine)
    domains: dict[str, dict[str, Any]] = {}
    languages: dict[str, SplitCount] = {}
    for (domain, split), group in frame.group_by("domain", "split", maintain_order=True):
        _refuse_unusable(str(domain), str(split), shard)
        target = (files, str(domain), cast("Split", split))
        measured = _write_group(*target, group, encode, chat.eos)
        domains.setdefault(str(domain), {})[str(split)] = _count(measured).model_dump()
        for (language,), rows in measured.group_by("language", maintain_order=True):
            before = languages.get(str(language), SplitCount())
            languages[str(language)] = added(before, _count(rows))
    return {
        "domains": domains,
        "languages": {name: count.model_dump() for name, count in languages.items()},
        "engine": engine,
    }


def added(x: SplitCount, y: SplitCount) -> SplitCount:
    """Both counts together."""
    return SplitCount(
        tokens=x.tokens + y.tokens, documents=x.documents + y.documents, bytes=x.bytes + y.bytes
    )


def choose_encoder(
    chat: ChatTokenizer, folder: Path, samples: Sequence[str], engine: str
) -> "tuple[Encode, str]":
    """How to encode many texts, and its name: `fastokens` if it may be used and agrees on the samples.

    `tokenizers` is the truth. What is compared is cut to a length, so that the check stays cheap.
    """
    import numpy as np

    def truth(batch: Sequence[str]) -> "Encoded":
        found = chat.encode_batch(batch)
        ends = np.cumsum([len(ids) for ids in found], dtype=np.int64)
        flat = np.fromiter((token for ids in found for token in ids), np.uint32)
        return flat, ends

    if engine == "auto" and (fast := _fast_encoder(folder)):
        checked = [text[:CHECKED_CHARS] for text in samples]
        if all(map(np.array_equal, fast(checked), truth(checked))):
            return fast, "fastokens"
    return truth, "tokenizers"


def _fast_encoder(folder: Path) -> "Encode | None":
    """fastokens' encoder, where it is installed and can read the tokenizer."""
    import numpy as np

    try:
        import fastokens

        model = fastokens.Tokenizer.from_file(str(folder / MODEL_FILE))
    except (ImportError, ValueError):  # not installed, or a part of the file is unknown to it
        return None

    def encode(batch: Sequence[str]) -> "Encoded":
        ids, offsets = model.encode_batch_flat(list(batch), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<u8")[1:].astype(np.int64)

    return encode


def _refuse_unusable(domain: str, split: str, shard: Shard) -> None:
    if not DOMAIN_NAME.fullmatch(domain):
        raise ValueError(
            f"{shard.entry.name}: domain {domain!r} cannot name a file; "
            "use letters, digits, '_', '-' and '.' in the source's `domain`"
        )
    if split not in SPLITS:
        raise ValueError(f"{shard.entry.name}: split {split!r} is none of {', '.join(SPLITS)}")


def _write_group(
    files: Path, domain: str, split: Split, group: "pl.DataFrame", encode: "Encode", eos: int
) -> "pl.DataFrame":
    """Write the files of one domain and split; the group with `tokens` (eos included) and `bytes`."""
    import numpy as np
    import polars as pl

    sizes = group["text"].str.len_bytes().to_numpy()
    counts: list[Any] = [np.empty(0, np.int64)]
    path = token_path(files, domain, split)
    with path.open("wb") as stream:
        for start, end in _batches(sizes):
            ids, ends = encode(group["text"][start:end].to_list())
            _refuse_impossible(ids, path)
            stream.write(np.insert(ids.astype(TOKEN), ends, eos).tobytes())
            counts.append(np.diff(ends, prepend=0) + 1)
    tokens = np.concatenate(counts)
    end_path(files, domain, split).write_bytes(np.cumsum(tokens).astype(END).tobytes())
    if split == "held":
        bytes_path(files, domain).write_bytes(sizes.astype(BYTES).tobytes())
    return group.select("language").with_columns(
        tokens=pl.Series(tokens), bytes=pl.Series(sizes).cast(pl.Int64)
    )


def _batches(sizes: "npt.NDArray[Any]") -> Iterator[tuple[int, int]]:
    """Ranges of documents of about BATCH_BYTES each; a longer document is a batch of its own."""
    start, size = 0, 0
    for i, of_text in enumerate(sizes):
        if size and size + of_text > BATCH_BYTES:
            yield start, i
            start, size = i, 0
        size += int(of_text)
    if start < len(sizes):
        yield start, len(sizes)


def _refuse_impossible(ids: "npt.NDArray[np.uint32]", path: Path) -> None:
    if len(ids) and (ids.min() < len(SPECIAL_TOKENS) or ids.max() > 0xFFFF):
        raise RuntimeError(
            f"{path.name}: text gave ids from {ids.min()} to {ids.max()}, expected "
            f"{len(SPECIAL_TOKENS)} to {0xFFFF}; the encoder is wrong, set tokenize.engine=tokenizers"
        )


def _count(documents: "pl.DataFrame") -> SplitCount:
    return SplitCount(
        tokens=int(documents["tokens"].sum()),
        documents=documents.height,
        bytes=int(documents["bytes"].sum()),
    )
