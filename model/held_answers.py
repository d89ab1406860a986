"""Answers to held-out prompts: what they earn, and the truth beside it."""

from collections.abc import Sequence
from typing import Any

from model.opinions import Opinion
from model.rollouts import Answering, Prompt, kl_of
from model.tuning import spread
from storage.scores import mean

HELD_SEED = 1 << 20
"""Keeps the noise of held-out answers apart from that of any iteration."""


class HeldAnswers:
    """The held-out prompts of a job, some of which are answered now and then."""

    def __init__(
        self, answering: Answering, prompts: Sequence[Prompt], truth: Opinion | None
    ) -> None:
        """Raises ValueError where the truth is wanted and there is no prompt."""
        if truth is not None and not prompts:
            raise ValueError(
                "truth_every_iterations looks at answers to held-out prompts, and the conversations have none "
                "that fits; hold some out (chats.held_share), or set truth_every_iterations=0"
            )
        self._answering, self._prompts, self._truth = answering, prompts, truth

    def figures(self, count: int) -> dict[str, Any]:
        """Reward, divergence, endings and truth of answers to so many prompts, with n and interval; none for
        0."""
        asked = [self._prompts[row] for row in spread(len(self._prompts), count)] if count else []
        if not asked:
            return {}
        rollout, means = self._answering.at(asked, HELD_SEED + self._answering.settings.seed)
        found = {
            "reward": mean(rollout.scores.tolist()).model_dump(),
            "kl": mean(kl_of(rollout).tolist()).model_dump(),
            "ended_share": mean(rollout.ended.tolist()).model_dump(),
            "answer_tokens": mean(rollout.mask.sum(1).tolist()).model_dump(),
            **means,
        }
        if self._truth is not None:
            said = self._answering.said({"truth": self._truth}, asked, rollout)["truth"]
            known = [value for value in said if value is not None]
            if known:
                found["truth"] = mean(known).model_dump()
        return found

    def look(self) -> dict[str, float]:
        """Means of truth, reward and divergence of answers to `truth_prompts` prompts, as metrics.

        Raises ValueError when nothing is known of the truth of any answer.
        """
        found = self.figures(self._answering.settings.truth_prompts)
        if "truth" not in found:
            raise ValueError(
                "the truth is known of none of the answers to held-out prompts; name a truth that knows these "
                "prompts, or set truth_every_iterations=0"
            )
        return {f"held_{name}": found[name]["value"] for name in ("truth", "reward", "kl")}
