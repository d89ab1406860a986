"""What documents cost under a language model, any one: windows, each token scored once, and rows of figures."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from model.parts import Part, Rows
from model.scoring import NO_LABEL, Report, padded
from model.transformer import Transformer, token_logprobs
from storage.tokens import Split, TokenFiles

PART_DOCUMENTS = 256
"""Enough to fill batches, few enough to lose little. Not a setting: a resumed job must cut as the one before."""


@dataclass(frozen=True)
class Reader:
    """A language model as far as documents need one."""

    nats: Callable[[Tensor, Tensor], Tensor]
    """Ids and labels, (B, T) each, NO_LABEL where nothing is scored -> (B,) nats, float64."""
    context: int
    """Longest row in tokens."""
    separator: int
    """Token that stands before a document."""
    device: torch.device


@dataclass(frozen=True)
class Document:
    """A document to be scored, in the ids of the token files."""

    domain: str
    split: Split
    ids: npt.NDArray[Any]
    bytes: int | None
    """UTF-8 bytes of its text, where the token files tell."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document: all of `ids` is read, the last `scored` labels count."""

    document: int
    ids: list[int]
    scored: int


def own_reader(model: Transformer, separator: int) -> Reader:
    """A model of ours as a reader."""

    def nats(ids: Tensor, labels: Tensor) -> Tensor:
        return -token_logprobs(model.head_weight, model.hidden(ids), labels).double().sum(1)

    return Reader(nats, model.shape.context, separator, model.embedding.weight.device)


def held_documents(files: TokenFiles, limit: int) -> Iterator[Document]:
    """Of every domain at most so many, spread evenly; 0 for all."""
    for domain in files.domains:
        for ids, size in files.held_documents(domain, limit):
            yield Document(domain, "held", ids, size)


def train_documents(files: TokenFiles, limit: int) -> Iterator[Document]:
    """The same of the training documents."""
    for domain in files.domains:
        for ids in files.train_documents(domain, limit):
            yield Document(domain, "train", ids, None)


def document_parts(
    documents: Sequence[Document],
    make: Callable[[Sequence[Document], Report], Rows],
    prefix: str = "",
) -> Iterator[Part]:
    """The documents in parts, of which `make` gives the rows."""
    for number, start in enumerate(range(0, len(documents), PART_DOCUMENTS)):
        chosen = documents[start : start + PART_DOCUMENTS]
        yield Part(
            f"{prefix}documents-{number:05d}.jsonl", len(chosen), functools.partial(make, chosen)
        )


def document_rows(
    documents: Sequence[Document],
    texts: Sequence[str],
    ids: Sequence[list[int]],
    nats: Sequence[float],
) -> Rows:
    """What each document is and costs."""
    return [
        {
            "domain": document.domain,
            "split": document.split,
            "bytes": document.bytes or len(text.encode("utf-8")),
            "characters": len(text),
            "tokens": len(tokens),
            "nats": value,
        }
        for document, text, tokens, value in zip(documents, texts, ids, nats, strict=True)
    ]


def document_nats(
    reader: Reader, documents: Sequence[list[int]], *, stride: float, batch: int, report: Report
) -> list[float]:
    """Nats of every document, each token scored once, the separator before the first; 0 for an empty one.

    Long documents are read in windows of the model's context; a window after the first scores the
    last `stride` of it. The document's end token is not scored: it is no byte of the text.
    """
    found = [0.0] * len(documents)
    step = max(1, int(reader.context * stride))
    windows = [
        window
        for place, ids in enumerate(documents)
        if ids
        for window in windows_of(place, [reader.separator, *ids], reader.context, step)
    ]
    windows.sort(key=lambda window: (-len(window.ids), window.document))
    for start in range(0, len(windows), batch):
        chosen = windows[start : start + batch]
        ids, labels = padded(
            [window.ids[:-1] for window in chosen],
            [
                [NO_LABEL] * (len(window.ids) - 1 - window.scored) + window.ids[-window.scored :]
                for window in chosen
            ],
            reader.device,
        )
        for window, value in zip(chosen, reader.nats(ids, labels).tolist(), strict=True):
            found[window.document] += value
        report(min(start + batch, len(windows)), len(windows))
    return found


def windows_of(document: int, tokens: list[int], context: int, step: int) -> list[Window]:
    """Windows of at most context + 1 tokens (inputs and their labels) that score each label once."""
    windows = [Window(document, tokens[: context + 1], min(len(tokens) - 1, context))]
    done = context + 1
    while done < len(tokens):
        end = min(done + step, len(tokens))
        windows.append(Window(document, tokens[max(0, end - context - 1) : end], end - done))
        done = end
    return windows
