"""Turns the documents of one shard into token files, the fast way where it gives the same ids."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from storage.corpus import Shard
from storage.tokenizer import META_FILE, MODEL_FILE, ChatTokenizer
from storage.tokens import (
    BYTES,
    END,
    SPLITS,
    TOKEN,
    IdType,
    Split,
    SplitCount,
    bytes_path,
    end_path,
    token_path,
)
from tasks.shard_batches import kept_batches

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import polars as pl

    Encoded = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
    Encode = Callable[[Sequence[str]], Encoded]
    """Ids of all texts after one another, and where each text's end."""

CHECKED_DOCUMENTS = 64
CHECKED_CHARS = 250
BATCH_BYTES = 2_000_000
"""Text that is encoded at once; the encoder takes 20 times as much memory."""

DOMAIN_NAME = re.compile(r"\w[\w.-]*")


def build_shard(
    files: Path, shard: Shard, tokenizer: Path, dtype: IdType, engine: str
) -> dict[str, Any]:
    """Write the token files of a shard's kept documents, in order of rows; some MB at a time.

    Returns counts per domain and split, and per language. Raises ValueError for a domain that cannot
    name a file.
    """
    chat = _load(tokenizer, (tokenizer / META_FILE).stat().st_mtime_ns)
    writer = _ShardWriter(files, chat, dtype)
    encode, name = None, "none"
    columns = ["domain", "split", "language", "text"]
    try:
        for frame in kept_batches(shard, columns, batch_bytes=BATCH_BYTES):
            if encode is None:
                encode, name = choose_encoder(chat, tokenizer, _samples(frame), engine)
            for (domain, split), group in frame.group_by("domain", "split", maintain_order=True):
                _refuse_unusable(str(domain), str(split), shard)
                writer.append(str(domain), cast("Split", split), group, encode)
    finally:
        writer.close()
    return {
        "domains": {
            domain: {split: count.model_dump() for split, count in splits.items()}
            for domain, splits in writer.domains.items()
        },
        "languages": {name: count.model_dump() for name, count in writer.languages.items()},
        "engine": name,
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
        found = [np.array(ids, np.uint32) for ids in chat.encode_batch(batch)]
        return np.concatenate(found), np.cumsum([len(ids) for ids in found], dtype=np.int64)

    if engine == "auto" and (fast := _fast_encoder(folder, chat.digest)):
        checked = [text[:CHECKED_CHARS] for text in samples]
        if all(map(np.array_equal, fast(checked), truth(checked))):
            return fast, "fastokens"
    return truth, "tokenizers"


@functools.lru_cache(maxsize=1)
def _load(folder: Path, _changed_ns: int) -> ChatTokenizer:
    """One tokenizer for each process: parsing it takes as long as encoding some MB."""
    return ChatTokenizer(folder)


@functools.lru_cache(maxsize=1)
def _fast_encoder(folder: Path, digest: str) -> "Encode | None":
    """fastokens' encoder, where it is installed and can read the tokenizer; one for each process."""
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


def forget_encoders() -> None:
    """Let go of what is kept for the next shard, 100 MB and more; for a process that goes on to other work."""
    _load.cache_clear()
    _fast_encoder.cache_clear()


def _samples(frame: "pl.DataFrame") -> list[str]:
    return frame["text"].gather_every(max(1, frame.height // CHECKED_DOCUMENTS)).to_list()


def _refuse_unusable(domain: str, split: str, shard: Shard) -> None:
    if not DOMAIN_NAME.fullmatch(domain):
        raise ValueError(
            f"{shard.entry.name}: domain {domain!r} cannot name a file; "
            "use letters, digits, '_', '-' and '.' in the source's `domain`"
        )
    if split not in SPLITS:
        raise ValueError(f"{shard.entry.name}: split {split!r} is none of {', '.join(SPLITS)}")


class _ShardWriter:
    """The files of one shard, open while its documents come; counts what goes in."""

    def __init__(self, files: Path, chat: ChatTokenizer, dtype: IdType) -> None:
        self.domains: dict[str, dict[Split, SplitCount]] = {}
        self.languages: dict[str, SplitCount] = {}
        self._files, self._chat, self._dtype = files, chat, TOKEN[dtype]
        self._streams: dict[Path, BinaryIO] = {}

    def append(self, domain: str, split: Split, group: "pl.DataFrame", encode: "Encode") -> None:
        """Documents of one domain and split, in order."""
        import numpy as np
        import polars as pl

        ids, ends = encode(group["text"].to_list())
        path = token_path(self._files, domain, split)
        _refuse_impossible(ids, path, self._chat)
        splits = self.domains.setdefault(domain, {})
        before = splits.get(split, SplitCount())
        tokens = np.diff(ends, prepend=0) + 1
        sizes = group["text"].str.len_bytes()
        self._write(path, np.insert(ids.astype(self._dtype), ends, self._chat.eos))
        self._write(
            end_path(self._files, domain, split), (before.tokens + np.cumsum(tokens)).astype(END)
        )
        if split == "held":
            self._write(bytes_path(self._files, domain), sizes.to_numpy().astype(BYTES))
        measured = group.select("language").with_columns(
            tokens=pl.Series(tokens), bytes=sizes.cast(pl.Int64)
        )
        splits[split] = added(before, _count(measured))
        for (language,), rows in measured.group_by("language", maintain_order=True):
            of_language = self.languages.get(str(language), SplitCount())
            self.languages[str(language)] = added(of_language, _count(rows))

    def close(self) -> None:
        """Close all files."""
        for stream in self._streams.values():
            stream.close()

    def _write(self, path: Path, values: "npt.NDArray[Any]") -> None:
        if path not in self._streams:
            self._streams[path] = path.open("wb")
        self._streams[path].write(values.tobytes())


def _refuse_impossible(ids: "npt.NDArray[np.uint32]", path: Path, chat: ChatTokenizer) -> None:
    import numpy as np

    if len(ids) == 0:
        return
    largest, special = int(ids.max()), sorted(chat.meta.special.values())
    found = [token for token in special if np.any(ids == token)]
    if found or largest >= chat.vocabulary:
        raise RuntimeError(
            f"{path.name}: text gave ids up to {largest} and the special ids {found}, expected ids "
            f"below {chat.vocabulary} and none of {special}; the encoder is wrong, set "
            "tokenize.engine=tokenizers"
        )


def _count(documents: "pl.DataFrame") -> SplitCount:
    return SplitCount(
        tokens=int(documents["tokens"].sum()),
        documents=documents.height,
        bytes=int(documents["bytes"].sum()),
    )
