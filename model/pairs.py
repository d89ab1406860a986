"""The policy's own answers as rejected ones, against the reference answers as chosen, or against each other.

Worker: `python -m model.pairs JOBFILE`. Writes `answered-train.jsonl` and `answered-held.jsonl` into the
job's state folder; the stage merges them with the pairs of files.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conf.contract import JobFile
from conf.pairs import PairsConfig
from model.dialogues import Renderer
from model.generate import generate
from model.journal import Journal
from model.judge import Judge
from model.opinions import functions
from model.ranks import Ranks
from model.reward import last_token_scores
from model.transformer import Transformer
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER
from storage.conversations import Conversation, is_withheld, read_conversations
from storage.jsonl import SPLITS, Split, content_id
from storage.preferences import Preference
from storage.tokenizer import ChatTokenizer

SCORED_ROWS = 32
"""Answers in one forward pass of a reward model."""


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Answer both sides' prompts, each rank its share; what came of each, in counts."""
    settings = PairsConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model = load_model(source, device=ranks.device)
    tokenizer = ChatTokenizer(source / TOKENIZER)
    answerer = Answerer(
        model, tokenizer, settings, ranks, ranking_of(job, settings, tokenizer, ranks)
    )
    figures: dict[str, Any] = {}
    for number, split in enumerate(SPLITS):
        rows = list(read_conversations(Path(job.inputs["conversations"]), split))
        pairs, counts = answerer.pairs(chosen_rows(rows, settings, split), split)
        if ranks.is_first:
            _write(job.state / f"answered-{split}.jsonl", pairs)
        figures[split] = counts
        journal.progress(number + 1, len(SPLITS), {}, unit="sides", is_due=True)
    return figures


def chosen_rows(
    rows: Sequence[Conversation], settings: PairsConfig, split: Split
) -> list[Conversation]:
    """Up to `max_prompts` conversations, drawn by the seed, in their order; of the training side those
    that are asked for."""
    if settings.prompts == "withheld" and split == "train":
        rows = [row for row in rows if is_withheld(row["messages"], settings.withheld_share)]
    if not settings.max_prompts or settings.max_prompts >= len(rows):
        return list(rows)
    key = np.random.SeedSequence((settings.seed, SPLITS.index(split)))
    drawn = np.random.Generator(np.random.Philox(key)).permutation(len(rows))
    return [rows[row] for row in sorted(drawn[: settings.max_prompts].tolist())]


class Candidate(NamedTuple):
    """An answer of the policy that ended."""

    row: Conversation
    prompt: list[int]
    answer: list[int]
    text: str


Ranking = Callable[[Sequence[Candidate]], list[float | None]]
"""A number for each answer, the larger the better; None where there is none."""


def ranking_of(
    job: JobFile, settings: PairsConfig, tokenizer: ChatTokenizer, ranks: Ranks
) -> Ranking | None:
    """What compares answers with one another; none where each meets the reference answer."""
    match settings.rank_by:
        case "reference":
            return None
        case "reward":
            model = load_model(Path(job.inputs["reward"]), device=ranks.device)
            return lambda found: reward_scores(model, found, tokenizer, ranks)
        case "functions":
            opinion = functions([Path(path) for path in job.sources["functions"]])
        case "judge":
            assert settings.judge is not None
            opinion = Judge(settings.judge, job.logs / "judged.jsonl")

    def asked(found: Sequence[Candidate]) -> list[float | None]:
        own = opinion([_as_answer(candidate) for candidate in found]) if ranks.is_first else []
        return ranks.gather(own)[0]

    return asked


@torch.no_grad()
def reward_scores(
    model: Transformer, found: Sequence[Candidate], tokenizer: ChatTokenizer, ranks: Ranks
) -> list[float | None]:
    """What a reward model makes of each answer; the ranks share the work."""
    renderer = Renderer(tokenizer, model.shape.context)
    by_length = sorted(range(len(found)), key=lambda n: len(found[n].prompt) + len(found[n].answer))
    own = by_length[ranks.rank :: ranks.world]
    scores: dict[int, float] = {}
    for start in range(0, len(own), SCORED_ROWS):
        part = own[start : start + SCORED_ROWS]
        # As whoever reads the pair will see it: as text, which may be cut into other tokens than were said.
        rows = [[*found[n].prompt, *renderer.answer(found[n].text)] for n in part]
        rows = [row[-model.shape.context :] for row in rows]
        scores |= dict(zip(part, last_token_scores(model, rows).tolist(), strict=True))
    merged = {n: score for some in ranks.gather(scores) for n, score in some.items()}
    return [merged[n] for n in range(len(found))]


def _as_answer(candidate: Candidate) -> dict[str, Any]:
    row = candidate.row
    return {
        "text": candidate.text,
        "is_ended": True,
        "messages": row["messages"][:-1],
        "reference": row["messages"][-1]["content"],
        **{name: row[name] for name in ("id", "domain", "language")},
    }


class Answerer:
    """A policy that answers the prompts of conversations."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: ChatTokenizer,
        settings: PairsConfig,
        ranks: Ranks,
        ranking: Ranking | None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._settings, self._ranks, self._ranking = settings, ranks, ranking

    def pairs(
        self, rows: Sequence[Conversation], split: Split
    ) -> tuple[list[Preference], dict[str, int]]:
        """Pairs of the policy's answers, and why the others were left out."""
        counts: Counter[str] = Counter()
        renderer = Renderer(self._tokenizer, self._model.shape.context)
        room = self._model.shape.context - self._settings.max_new_tokens
        asked: list[tuple[Conversation, list[int]]] = []
        for row in rows:
            prompt = renderer.prompt(row["messages"][:-1], room)
            if prompt is None:
                counts["prompt_too_long"] += 1
            else:
                asked += [(row, prompt)] * self._settings.answers
        answers = self._answer([prompt for _, prompt in asked], split)
        found: list[Candidate] = []
        seen: set[tuple[str, str]] = set()
        for (row, prompt), answer in zip(asked, answers, strict=True):
            text = "" if answer is None else self._tokenizer.decode(answer).strip()
            reason = self._reason_against(row, answer, text)
            said = (content_id(row["messages"]), text)
            if reason or answer is None or said in seen:
                counts[reason or "repeated"] += 1
                continue
            seen.add(said)
            found.append(Candidate(row, prompt, answer, text))
        pairs = (
            self._against_reference(found) if self._ranking is None else self._ranked(found, counts)
        )
        counts["kept"] = len(pairs)
        return pairs, {"prompts": len(rows), "answers": len(asked), **counts}

    def _reason_against(self, row: Conversation, answer: list[int] | None, text: str) -> str:
        if answer is None:
            return "answer_too_long"
        if not text:
            return "answer_empty"
        is_known = self._ranking is None and text == row["messages"][-1]["content"].strip()
        return "answer_equal" if is_known else ""

    def _against_reference(self, found: Sequence[Candidate]) -> list[Preference]:
        return [
            _preference(one.row, one.row["messages"][-1]["content"], one.text, None)
            for one in found
        ]

    def _ranked(self, found: Sequence[Candidate], counts: Counter[str]) -> list[Preference]:
        """Pairs among the answers to each prompt, the margin the difference of their scores."""
        assert self._ranking is not None
        groups: dict[str, list[tuple[float, str, Conversation]]] = {}
        for one, score in zip(found, self._ranking(found), strict=True):
            if score is None:
                counts["answer_unranked"] += 1
            else:
                key = content_id(one.row["messages"])
                groups.setdefault(key, []).append((score, one.text, one.row))
        pairs: list[Preference] = []
        for group in groups.values():
            group.sort(key=lambda item: -item[0])
            chosen = [(group[0], group[-1])]
            if self._settings.several_answers == "all_pairs":
                chosen = list(combinations(group, 2))
            made = [
                _preference(row, better, worse, above - below)
                for (above, better, row), (below, worse, _) in chosen
                if above > below
            ]
            counts["prompt_without_a_better_answer"] += not made
            pairs += made
        return pairs

    def _answer(self, prompts: Sequence[Sequence[int]], split: Split) -> list[list[int] | None]:
        """Ids of each answer; none for one that did not end."""
        settings, ranks = self._settings, self._ranks
        own = range(ranks.rank, len(prompts), ranks.world)
        found = generate(
            self._model,
            [prompts[row] for row in own],
            at_once=settings.batch_rows,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=2 * settings.seed + SPLITS.index(split),
            eos=self._tokenizer.im_end,
            pad=self._tokenizer.pad,
            rows=own,
        )
        answers = {
            row: found.answer(place) if bool(found.ended[place]) else None
            for place, row in enumerate(own)
        }
        merged = {row: ids for part in ranks.gather(answers) for row, ids in part.items()}
        return [merged[row] for row in range(len(prompts))]


def _preference(row: Conversation, chosen: str, rejected: str, margin: float | None) -> Preference:
    prompt = row["messages"][:-1]
    return Preference(
        id=content_id([prompt, chosen, rejected]),
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        domain=row["domain"],
    )


def _write(path: Path, pairs: Sequence[Preference]) -> None:
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    draft = path.with_suffix(".draft")
    draft.write_text(text, "utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
