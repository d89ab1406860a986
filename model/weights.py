"""Weights and checkpoints on disk: safetensors, written whole or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.ranks import Group, Ranks
from model.transformer import Transformer
from storage.checkpoint import CONFIG, TOKENIZER, WEIGHTS, ModelCard
from storage.errors import BessemerError
from storage.identity import differences
from storage.store_local import flush_folder, flush_tree
from storage.tokenizer import copy_tokenizer, read_meta

COMPLETE = "complete.json"
FORM = 2
"""Of the tensors in a checkpoint; one of another form cannot be gone on from."""

Write = Callable[[Path], None]
"""Puts this process's tensors into a folder."""

Role = Literal["policy", "reward", "value"]


class ForeignCheckpoint(BessemerError):
    """A checkpoint was written by another computation than the one that wants to go on from it."""


def save_model(
    files: Path,
    model: Transformer,
    *,
    role: Role,
    tokenizer: Path,
) -> ModelCard:
    """Write a model artifact's content into `files`: fp32 weights, card, a copy of the tokenizer.

    `tokenizer` is the folder to copy.
    """
    files.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    save_tensors(files / WEIGHTS, {name: w.float() for name, w in state.items()})
    copy_tokenizer(tokenizer, files / TOKENIZER)
    card = ModelCard(
        shape=model.shape,
        vocabulary=model.vocabulary,
        role=role,
        tokenizer_digest=read_meta(tokenizer).digest,
        parameters=sum(weight.numel() for weight in state.values()),
    )
    card.write(files)
    return card


def load_model(
    files: Path,
    *,
    weights: Path | None = None,
    device: torch.device | str = "cpu",
    is_scalar: bool | None = None,
    seed: int = 0,
) -> Transformer:
    """The model in the folder `files` of an artifact, fp32; `weights` names another file of its weights.

    `is_scalar` true turns a policy into a scalar model, whose new head is drawn from `seed`; by default
    the model stays what it is. Raises ValueError for a policy wanted from a scalar model.
    """
    card = ModelCard.read(files)
    state = load_file(weights or files / WEIGHTS)
    was_scalar = card.role != "policy"
    wants_scalar = was_scalar if is_scalar is None else is_scalar
    if was_scalar and not wants_scalar:
        raise ValueError(
            f"{files / CONFIG} is a {card.role} model, a policy is needed here; name a policy instead"
        )
    model = Transformer(card.shape, card.vocabulary, is_scalar=wants_scalar, seed=seed)
    if wants_scalar and not was_scalar:
        state.pop("head.weight", None)
        state["score_head.weight"] = model.state_dict()["score_head.weight"]
    model.load_state_dict(state)
    return model.to(device)


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors; the same tensors give the same bytes."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(whole, path, metadata)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, on the CPU."""
    return load_file(path)


def tensor_of(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, without reading the others."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint: after `step` steps, with the plain state that was kept beside it."""

    step: int
    path: Path
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one job, in one folder; all ranks take part in saving.

    `identity` says what is computed (settings, digests of inputs), as JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], ranks: Ranks) -> None:
        self.folder, self.identity, self.ranks = folder, {"form": FORM, **identity}, ranks
        self._writer: ThreadPoolExecutor | None = None
        self._group: Group | None = None
        self._writing: Future[None] | None = None

    def newest(self) -> Saved | None:
        """The newest complete one, if any; the generators of random numbers are set as they were.

        Raises ForeignCheckpoint, naming each difference, when it belongs to another computation.
        """
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            if (content := _sound(path)) is None:
                continue
            if found := list(differences(content["identity"], self.identity)):
                raise ForeignCheckpoint(
                    f"{path} belongs to another computation ({'; '.join(found[:8])}); remove the "
                    f"folder to start anew, or ask for what it was made with"
                )
            _restore_generators(path, self.ranks)
            return Saved(content["step"], path, content["state"])
        return None

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        snapshot: Callable[[bool], Write],
        *,
        kept: int = 2,
        is_beside: bool = False,
    ) -> None:
        """Write one, and keep the newest `kept`. `state` holds plain JSON values; the first rank's is kept.

        `snapshot`, told whether what it takes has to last, gives what writes this rank's tensors.
        `is_beside` lets that happen in a thread of its own while training goes on; `settle` waits for it,
        and so does the next save. What is there is complete or absent.
        """
        self.settle()
        draft = self.folder / f"draft_{step:09d}"
        if self.ranks.is_first:
            for left in self.folder.glob("draft_*"):
                shutil.rmtree(left)
            draft.mkdir(parents=True)
        self.ranks.wait()
        write = snapshot(is_beside)
        _save_generators(draft, self.ranks)
        content = {"step": step, "identity": self.identity, "state": dict(state)}
        if not is_beside:
            self._finish(draft, content, write, kept, None)
            return
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "checkpoint")
            self._group = self.ranks.group_of_threads()
        self._writing = self._writer.submit(self._finish, draft, content, write, kept, self._group)

    def settle(self) -> None:
        """Wait for what is being written; raises what went wrong there. All ranks call it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _finish(
        self, draft: Path, content: dict[str, Any], write: Write, kept: int, group: Group | None
    ) -> None:
        write(draft)
        self.ranks.wait(group)
        if self.ranks.is_first:
            _complete(draft, content, kept)
        self.ranks.wait(group)


def _complete(draft: Path, content: dict[str, Any], kept: int) -> None:
    """Make a draft that all ranks have written a checkpoint, and remove those that are too old."""
    sizes = {
        str(path.relative_to(draft)): path.stat().st_size
        for path in sorted(draft.rglob("*"))
        if path.is_file()
    }
    (draft / COMPLETE).write_text(json.dumps({**content, "sizes": sizes}), "utf-8")
    flush_tree(draft)
    folder = draft.parent
    target = folder / f"step_{content['step']:09d}"
    if target.exists():
        shutil.rmtree(target)
    draft.rename(target)
    flush_folder(folder)
    for old in sorted(folder.glob("step_*"))[:-kept]:
        shutil.rmtree(old)


def _sound(path: Path) -> dict[str, Any] | None:
    """What the checkpoint says of itself, or none when it is not whole."""
    if not (path / COMPLETE).is_file():
        return None
    content = json.loads((path / COMPLETE).read_text("utf-8"))
    is_whole = all(
        (path / name).is_file() and (path / name).stat().st_size == size
        for name, size in content["sizes"].items()
    )
    return content if is_whole else None


def _save_generators(folder: Path, ranks: Ranks) -> None:
    state = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    save_tensors(folder / f"generators-{ranks.place:05d}.safetensors", state)


def _restore_generators(folder: Path, ranks: Ranks) -> None:
    path = folder / f"generators-{ranks.place:05d}.safetensors"
    if not path.is_file():
        # Fewer ranks saved than now go on; nothing that is computed draws from these generators.
        return
    state = load_tensors(path)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
