"""What is looked at while a language model trains: held-out loss, what it writes after fixed prompts; and
the weights that are kept of it."""

from pathlib import Path

import torch

from conf.pretrain import PretrainConfig
from model.best import Best
from model.generate import generate
from model.held_out import HeldOut
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import save_tensors
from storage.checkpoint import look_path
from storage.tokens import TokenFiles


class Looks:
    """The looks of one job. The best model so far is kept in `state` where it is to be the policy, the weights
    of every so many looks in `kept`."""

    def __init__(
        self,
        files: TokenFiles,
        settings: PretrainConfig,
        ranks: Ranks,
        journal: Journal,
        state: Path,
        kept: Path,
    ) -> None:
        self._files, self._settings = files, settings
        self._ranks, self._journal = ranks, journal
        self._held = HeldOut(files, settings, ranks)
        self._best = Best(state / "best.safetensors", ranks)
        self._kept = kept

    def at(self, step: int, model: Transformer) -> dict[str, float]:
        """Figures of the model after so many steps; its answers go to the journal."""
        figures = self._held.losses(model)
        if self._settings.keeps_best:
            self._best.offer(model, step, -figures["held_loss"])
        if self._settings.prompts and self._ranks.is_first:
            texts = continuations(model, self._files, self._settings)
            self._journal.samples(step, dict(zip(self._settings.prompts, texts, strict=True)))
        every = self._settings.kept_looks * self._settings.evaluate_every_steps
        if every and step % every == 0 and self._ranks.is_first:
            self._keep(step, model)
        return figures

    def _keep(self, step: int, model: Transformer) -> None:
        path = look_path(self._kept, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        save_tensors(draft, {name: w.float() for name, w in model.state_dict().items()})
        draft.replace(path)

    def restore(self, model: Transformer) -> dict[str, float]:
        """Give the model the best weights seen; the step they are of, and what was seen then."""
        return {"kept_step": self._best.restore(model), **self._held.losses(model)}


def continuations(model: Transformer, files: TokenFiles, settings: PretrainConfig) -> list[str]:
    """What the model most likely writes after each of the settings' prompts, up to an eos."""
    tokenizer, room = files.tokenizer, settings.shape.context - 1
    length = min(settings.prompt_tokens, room // 2)
    asked = [tokenizer.encode(prompt)[-(room - length) :] for prompt in settings.prompts]
    # As in training, a document begins behind an eos.
    ids = [[tokenizer.eos, *prompt] for prompt in asked]
    # Its rows grow token by token: each length would be compiled anew.
    with torch.compiler.set_stance("force_eager"):
        found = generate(
            model,
            ids,
            max_new_tokens=length,
            temperature=0.0,
            seed=settings.seed,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )
    return [tokenizer.decode(found.answer(row)) for row in range(len(ids))]
