"""The tokens artifact: documents as uint16 or uint32 ids, per domain and split, read through mmap.

Per domain and split (`train`, `held`):
- `<domain>.<split>.bin`: little-endian ids as wide as `meta.json` says, `<|eos|>` after every document;
- `<domain>.<split>.idx`: uint64 little-endian, where each document ends, in tokens (its eos included);
- `<domain>.held.bytes`: uint32 little-endian, UTF-8 bytes of each held-out document, for bits per byte.
- `<domain>.train.<column>.npy`: float32, one value a training document in the order of `.idx`; how
  difficult it is, for curricula. Larger is more difficult.
`meta.json` counts them; `tokenizer/` is a copy of the tokenizer. Reading needs numpy and pydantic.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from storage.artifact import Artifact
from storage.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    # The graph process knows this kind of artifact and reads none: numpy costs it 0.1 s to import.
    import numpy as np
    import numpy.typing as npt

Split = Literal["train", "held"]
IdType = Literal["uint16", "uint32"]
SPLITS: tuple[Split, ...] = ("train", "held")

META_FILE = "meta.json"
TOKENIZER_FOLDER = "tokenizer"

TOKEN = {"uint16": "<u2", "uint32": "<u4"}
END = "<u8"
BYTES = "<u4"
"""As numpy writes them: little-endian, unsigned, that many bytes."""


class SplitCount(BaseModel):
    """How much one split of one domain holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = 0
    """The eos after every document included."""
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of the text."""


class TokensMeta(BaseModel):
    """What the token files hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: IdType = "uint16"
    eos: int
    vocabulary: int
    tokenizer_digest: str
    domains: dict[str, dict[Split, SplitCount]]
    """Every domain has both splits, an empty one with zeros and empty files."""


class TokenFiles:
    """Reads a folder of token files; arrays are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        """Open the folder.

        Raises FileNotFoundError, and ValueError if a file's size is not the one `meta.json` counts.
        """
        self.folder = folder
        self.meta = TokensMeta.model_validate_json((folder / META_FILE).read_text("utf-8"))
        for domain, splits in self.meta.domains.items():
            for split, count in splits.items():
                _check_size(token_path(folder, domain, split), count.tokens, TOKEN[self.meta.dtype])
                _check_size(end_path(folder, domain, split), count.documents, END)

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted."""
        return sorted(self.meta.domains)

    def count(self, domain: str, split: Split) -> SplitCount:
        """How much a split holds. Raises ValueError for an unknown domain."""
        if domain not in self.meta.domains:
            raise ValueError(f"no domain {domain!r} in {self.folder}; it has {self.domains}")
        return self.meta.domains[domain][split]

    def tokens(self, domain: str, split: Split) -> "npt.NDArray[np.uint16 | np.uint32]":
        """(tokens,) of `meta.dtype`, all documents after one another."""
        count = self.count(domain, split).tokens
        return _map(token_path(self.folder, domain, split), count, TOKEN[self.meta.dtype])

    def ends(self, domain: str, split: Split) -> "npt.NDArray[np.uint64]":
        """(documents,) uint64, where each document ends; document i is `tokens[ends[i-1]:ends[i]]`."""
        count = self.count(domain, split).documents
        return _map(end_path(self.folder, domain, split), count, END)

    def text_bytes(self, domain: str) -> "npt.NDArray[np.uint32]":
        """(documents,) uint32, UTF-8 bytes of every held-out document."""
        count = self.count(domain, "held").documents
        return _map(bytes_path(self.folder, domain), count, BYTES)

    def difficulty(self, domain: str, column: str) -> "npt.NDArray[np.float32]":
        """(documents,) float32: a column of the training documents; larger is more difficult.

        Raises ValueError for a column that tokenize was not asked for, or of another length.
        """
        import numpy as np

        path = difficulty_path(self.folder, domain, column)
        if not path.is_file():
            prefix, suffix = f"{domain}.train.", ".npy"
            known = sorted(
                found.name.removeprefix(prefix).removesuffix(suffix)
                for found in self.folder.glob(f"{prefix}*{suffix}")
            )
            raise ValueError(
                f"{self.folder} has no difficulty column {column!r} of domain {domain!r}, only "
                f"{known}; name it in tokenize.difficulty"
            )
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        count = self.count(domain, "train").documents
        if values.shape != (count,) or values.dtype != np.float32:
            raise ValueError(
                f"{path} holds {values.dtype} {values.shape}, {META_FILE} counts {count} documents; the "
                "artifact is damaged: run `bessemer verify`, then the recipe again"
            )
        return values

    def held_documents(
        self, domain: str, limit: int = 0
    ) -> "list[tuple[npt.NDArray[np.uint16 | np.uint32], int]]":
        """Ids without the eos, and UTF-8 bytes, of the held-out documents that have text.

        With a `limit` at most so many of them, spread evenly.
        """
        sizes = self.text_bytes(domain)
        return [(ids, int(sizes[i])) for i, ids in self._documents(domain, "held", limit)]

    def train_documents(
        self, domain: str, limit: int
    ) -> "list[npt.NDArray[np.uint16 | np.uint32]]":
        """Ids without the eos of at most so many training documents that have text, spread evenly."""
        return [ids for _, ids in self._documents(domain, "train", limit)]

    def _documents(
        self, domain: str, split: Split, limit: int
    ) -> "Iterator[tuple[int, npt.NDArray[np.uint16 | np.uint32]]]":
        ends, ids = self.ends(domain, split), self.tokens(domain, split)
        step = -(-len(ends) // limit) if limit else 1
        for place in range(0, len(ends), max(step, 1)):
            start, end = int(ends[place - 1]) if place else 0, int(ends[place])
            if end - start > 1:
                yield place, ids[start : end - 1]

    @functools.cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer that made the ids."""
        return ChatTokenizer(self.folder / TOKENIZER_FOLDER)


@dataclass(frozen=True)
class Tokens(Artifact):
    """A tokenised corpus."""

    kind: ClassVar[str] = "tokens"

    @functools.cached_property
    def reader(self) -> TokenFiles:
        """The token files, mapped."""
        return TokenFiles(self.files)


def token_path(folder: Path, domain: str, split: Split) -> Path:
    """File of the ids."""
    return folder / f"{domain}.{split}.bin"


def end_path(folder: Path, domain: str, split: Split) -> Path:
    """File of the document ends."""
    return folder / f"{domain}.{split}.idx"


def bytes_path(folder: Path, domain: str) -> Path:
    """File of the held-out documents' text lengths."""
    return folder / f"{domain}.held.bytes"


def difficulty_path(folder: Path, domain: str, column: str) -> Path:
    """File of a difficulty column of the training documents."""
    return folder / f"{domain}.train.{column}.npy"


def write_meta(folder: Path, meta: TokensMeta) -> None:
    """Write what the files hold."""
    (folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", "utf-8")


def _check_size(path: Path, count: int, dtype: str) -> None:
    width = int(dtype[-1])
    if path.stat().st_size != count * width:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, {META_FILE} counts {count} x {width}; "
            "the artifact is damaged: run `bessemer verify`, then the recipe again"
        )


def _map(path: Path, count: int, dtype: str) -> "npt.NDArray[Any]":
    import numpy as np

    if count == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
