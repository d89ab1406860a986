"""A Hugging Face model of any family on our held-out documents. Worker: `python -m model.outside JOBFILE`.

The one place where transformers computes: what our own model can be is read by `model/huggingface.py`.
"""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from conf.contract import JobFile
from conf.outside import OutsideConfig
from model.adopt import folder_of
from model.documents import (
    Document,
    Reader,
    document_nats,
    document_parts,
    document_rows,
    held_documents,
)
from model.journal import Journal
from model.parts import Rows, run_parts
from model.ranks import Ranks
from model.scoring import NO_LABEL, Report
from model.worker import run
from storage.tokenizer import NO_LIMIT
from storage.tokens import TokenFiles

PROBE_TOKENS = 8
SAME = 1e-3
"""Logits of the same tokens may differ so much by rounding."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Read the folder and score every document; what the model is."""
    settings = OutsideConfig.model_validate(job.settings)
    folder = folder_of([Path(path) for path in job.sources["sources"]])
    files = TokenFiles(Path(job.inputs["tokens"]))
    model, tokenizer = opened(folder, ranks.device)
    context = context_of(model.config, settings.context)
    separator = separator_of(tokenizer, model.config)
    reader = Reader(functools.partial(window_nats, model), context, separator, ranks.device)
    documents = [*held_documents(files, settings.held_documents)]
    make = functools.partial(_rows, reader, tokenizer, files, settings)
    with torch.inference_mode():
        refuse_what_looks_ahead(model, ranks.device)
        run_parts([*document_parts(documents, make)], job, ranks, journal)
    return {
        "family": model.config.model_type,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": len(tokenizer),
        "context": context,
        "documents": len(documents),
    }


def opened(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, from safetensors alone and without code of the folder.

    Raises ValueError where transformers is not installed or cannot read the folder.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError(
            "a model that is not ours is read by transformers; pip install 'bessemer[outside]'"
        ) from error
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **given, model_max_length=NO_LIMIT)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, **given, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"transformers cannot read {folder} ({error}); give a folder of a causal language model that "
            "`save_pretrained` wrote, with its tokenizer"
        ) from error
    return model.to(device).eval(), tokenizer


def context_of(config: Any, wanted: int) -> int:
    """Longest window. Raises ValueError for one beyond the model's positions, or where nothing tells."""
    known = int(getattr(config, "max_position_embeddings", None) or 0)
    if wanted and known and wanted > known:
        raise ValueError(
            f"context={wanted} is longer than the model's {known} positions; give less, or 0"
        )
    if not (wanted or known):
        raise ValueError(
            f"a {config.model_type} does not tell how long a text it can read; give outside.context"
        )
    return wanted or known


def separator_of(tokenizer: Any, config: Any) -> int:
    """The token that documents are read behind: the one that texts begin with, else the one they end with.

    A tokenizer's own end is that of a turn in a conversation as often as not, the model's that of a text.
    Raises ValueError where neither names one.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    begins = [tokenizer.bos_token_id, config.bos_token_id]
    for token in (*begins, *ends, tokenizer.eos_token_id):
        if token is not None and 0 <= token < len(tokenizer):
            return token
    raise ValueError(
        "neither tokenizer nor config.json names a bos_token or eos_token, and the first token of a document "
        "needs one before it; name one in tokenizer_config.json"
    )


def refuse_what_looks_ahead(model: Any, device: torch.device) -> None:
    """Raises ValueError for a model whose prediction depends on what it has to predict."""
    ids = torch.arange(PROBE_TOKENS, device=device)[None]
    one, other = (
        model(row).logits[:, :-1] for row in (ids, torch.cat([ids[:, :-1], ids[:, :1]], dim=1))
    )
    if (one - other).abs().max() > SAME * one.abs().max():
        raise ValueError(
            f"this {model.config.model_type} sees the tokens that come after: what it says of a text is no "
            "likelihood; give a causal language model"
        )


def window_nats(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """(B,) nats of the labels, float64. Rows are padded on the right, where a causal model does not look."""
    found = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    # Row by row: the logits of a batch with a large vocabulary take enough room without a copy.
    for row, (logits, wanted) in enumerate(zip(model(ids).logits, labels, strict=True)):  # (T, V)
        places = wanted != NO_LABEL
        each = functional.cross_entropy(logits[places].float(), wanted[places], reduction="none")
        found[row] = each.double().sum()
    return found


def _rows(
    reader: Reader,
    tokenizer: Any,
    files: TokenFiles,
    settings: OutsideConfig,
    documents: Sequence[Document],
    report: Report,
) -> Rows:
    texts = [files.tokenizer.decode(document.ids.tolist()) for document in documents]
    ids: list[list[int]] = [
        tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        for text in texts
    ]
    nats = document_nats(reader, ids, stride=settings.stride, batch=settings.batch, report=report)
    rows = document_rows(documents, texts, ids, nats)
    for row, text, tokens in zip(rows, texts, ids, strict=True):
        told = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        # SentencePiece puts a space before a text.
        row["is_restored"] = told.strip() == text.strip()
    return rows


if __name__ == "__main__":
    main()
