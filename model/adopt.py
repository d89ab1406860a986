"""A model from a Hugging Face folder becomes a policy. Worker: `python -m model.adopt JOBFILE`."""

import json
from pathlib import Path
from typing import Any

import torch

from conf.adopt import AdoptConfig
from conf.contract import JobFile
from model.huggingface import read_hf, resized
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import save_model
from model.worker import run
from storage.checkpoint import CONFIG
from storage.tokenizer import MODEL_FILE, read_meta

PROBE_ROWS, PROBE_TOKENS = 4, 64
ADAPTER = "adapter_config.json"
"""What peft writes beside low-rank corrections."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Read the folder, fit its embeddings to the tokenizer, and write the policy."""
    settings = AdoptConfig.model_validate(job.settings)
    tokenizer = Path(job.inputs["tokenizer"])
    folder = folder_of([Path(path) for path in job.sources["sources"]])
    refuse_other_tokenizer(folder, tokenizer)
    theirs = read_hf(folder, context=settings.context)
    vocabulary = read_meta(tokenizer).vocabulary
    model = with_vocabulary(theirs, vocabulary)
    difference = change_of(theirs, model)
    if difference > 0:
        raise ValueError(
            f"resizing the embeddings from {theirs.vocabulary} to {vocabulary} tokens changed logits by "
            f"{difference}; report this, the model would not be the one that was read"
        )
    card = save_model(job.files, model, role="policy", tokenizer=tokenizer)
    return {
        "parameters": card.parameters,
        "embedding_share": card.shape.embedding_share(vocabulary),
        "vocabulary": vocabulary,
        "vocabulary_before": theirs.vocabulary,
        "context": card.shape.context,
    }


def folder_of(paths: list[Path]) -> Path:
    """The folder of the one `config.json` among the files.

    Raises ValueError for none or several, and for an adapter beside or in place of a model: without it the
    policy, and with that the reference of what is learnt next, would be the model before its training.
    """
    if adapter := next((path for path in paths if path.name == ADAPTER), None):
        raise ValueError(
            f"{adapter.parent} holds an adapter that is not merged ({ADAPTER}); merge it (peft: "
            "merge_and_unload), save the whole model, and name that folder"
        )
    found = sorted({path.parent for path in paths if path.name == CONFIG})
    if len(found) != 1:
        told = ", ".join(map(str, found)) or "none"
        raise ValueError(f"sources hold {told} {CONFIG}; name the folder of one model")
    return found[0]


def refuse_other_tokenizer(folder: Path, tokenizer: Path) -> None:
    """Raises ValueError when a token of the folder's own tokenizer has another id in the given one."""
    if not (folder / MODEL_FILE).is_file():
        return
    theirs, given = ids_of(folder / MODEL_FILE), ids_of(tokenizer / MODEL_FILE)
    moved = [token for token, index in theirs.items() if given.get(token) != index]
    if moved:
        raise ValueError(
            f"{len(moved)} tokens of {folder / MODEL_FILE} have other ids in the tokenizer that is given, "
            f"the first is {moved[0]!r}; give a tokenizer node with adopt: [{{path: {folder.name}}}]"
        )


def ids_of(path: Path) -> dict[str, int]:
    """Token -> id of a `tokenizer.json`, the added ones among them."""
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):
        # Unigram: [piece, score] in the order of the ids.
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in content["added_tokens"]}}


def with_vocabulary(model: Transformer, vocabulary: int) -> Transformer:
    """The model with that many token ids: rows that no id has go, new ones are the mean of the old."""
    if vocabulary == model.vocabulary:
        return model
    state = dict(model.state_dict())
    for name in ("embedding.weight", "head.weight"):
        if name in state:
            state[name] = resized(state[name], vocabulary)
    wider = Transformer(model.shape, vocabulary)
    wider.load_state_dict(state)
    return wider


@torch.no_grad()
def change_of(one: Transformer, other: Transformer) -> float:
    """Largest difference of the logits of the token ids that both have."""
    shared = min(one.vocabulary, other.vocabulary)
    tokens = min(PROBE_TOKENS, one.shape.context)
    ids = torch.randint(
        shared, (PROBE_ROWS, tokens), generator=torch.Generator().manual_seed(0)
    )  # (B, T)
    weights = (one.head_weight[:shared], other.head_weight[:shared])
    found = [
        model.hidden(ids) @ weight.T for model, weight in zip((one, other), weights, strict=True)
    ]
    return float((found[0] - found[1]).abs().max())


if __name__ == "__main__":
    main()
