"""The stage that makes preference pairs: from files, and from a policy's own answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

from conf.pairs import PairsConfig
from storage.checkpoint import Policy, RewardModel
from storage.conversations import Conversations
from storage.jsonl import SPLITS, Split, SplitWriter, content_id, read_jsonl
from storage.preferences import Preference, Preferences
from storage.source import SourceFile
from tasks.launch import run_worker
from tasks.preference_formats import PairRow, parse_pairs, rated_scores
from tasks.rows import BadRow, read_rows
from tasks.stage import Job, stage
from tasks.tally import Tally, in_split_order

ANSWERED = "answered-{split}.jsonl"
"""In `state/`, written by the worker: pairs whose rejected answer is the policy's own."""


@stage(version=3, uses_torch=True)
def pairs(
    job: Job,
    settings: PairsConfig,
    policy: Policy | None = None,
    conversations: Conversations | None = None,
    reward: RewardModel | None = None,
) -> Preferences:
    """Read pairs from files; with a policy and conversations, add pairs of the reference answer
    (chosen) against the policy's own (rejected), or of its own answers as something ranks them.

    reads sources, Policy, Conversations, RewardModel   writes Preferences   cost `answers` answers per
    conversation
    """
    named = {"policy": policy, "conversations": conversations, "reward": reward}
    inputs = {name: artifact for name, artifact in named.items() if artifact is not None}
    settings.refuse_inputs(inputs)
    if policy is not None:
        if reward is not None:
            _refuse_other_tokens(policy, reward)
        job.metrics["answered"] = run_worker(job, "model.pairs", settings, inputs)
    tally = Tally(settings.held_share, settings.on_bad_row, settings.keep_duplicates)
    lengths = LengthBias()
    with SplitWriter(job.files) as writer:
        for split, row in chain(_from_files(job, settings, tally), _answered(job.state)):
            chosen, rejected = row["chosen"], row["rejected"]
            if chosen is not None and rejected is not None:
                if settings.max_similarity < 1 and (
                    similarity(chosen, rejected) > settings.max_similarity
                ):
                    lengths.near_equal += 1
                    continue
                lengths.add(chosen, rejected)
            writer.write(split, row)
    job.metrics |= {**tally.figures(), **lengths.figures(), **writer.counts}
    job.tables |= tally.tables()
    return Preferences(job.path)


def _refuse_other_tokens(policy: Policy, reward: RewardModel) -> None:
    if policy.card.tokenizer_digest != reward.card.tokenizer_digest:
        raise ValueError(
            f"the policy speaks the tokens of {policy.card.tokenizer_digest[:12]}, the reward model "
            f"those of {reward.card.tokenizer_digest[:12]}; train the reward model from this policy"
        )


def _from_files(
    job: Job, settings: PairsConfig, tally: Tally
) -> Iterator[tuple[Split, Preference]]:
    files = in_split_order(job.sources["sources"]) if settings.sources else []
    keeps_labelled = settings.labelled == "keep"

    def parse(row: Any) -> list[PairRow]:
        return parse_pairs(row, settings.several_answers, keeps_labelled=keeps_labelled)

    for number, file in enumerate(files):
        job.report_progress(number, len(files), "files")
        unit = _range_of_scores(file) if settings.margins == "scaled" else 1.0
        for _, found in tally.parsed(file, parse):
            tally.add(file, "further", len(found) - 1)
            for row in found:
                tally.layouts[row.layout] += 1
                preference = _preference(row, file.spec.domain, unit)
                held_by = preference["id"] if settings.held_by == "pair" else ""
                if split := tally.place(file, preference["id"], row.prompt, held_by):
                    yield split, preference


def _range_of_scores(file: SourceFile) -> float:
    """By how much the best score of a file is above the worst; 1 where there are no two."""
    scores = [
        score
        for row in read_rows(file)
        if not isinstance(row, BadRow)
        for score in rated_scores(row[1])
    ]
    return (max(scores) - min(scores) if scores else 0.0) or 1.0


def similarity(one: str, other: str) -> float:
    """Share of the character trigrams of both texts that both have (Jaccard), white space apart."""
    trigrams = [_trigrams("".join(text.split())) for text in (one, other)]
    return len(trigrams[0] & trigrams[1]) / len(trigrams[0] | trigrams[1])


def _trigrams(text: str) -> set[str]:
    return {text[at : at + 3] for at in range(max(1, len(text) - 2))}


@dataclass
class LengthBias:
    """Whether the better answers are the longer ones, in characters."""

    pairs: int = 0
    longer: int = 0
    chosen_chars: int = 0
    rejected_chars: int = 0
    near_equal: int = 0
    """Pairs that were dropped since their answers say almost the same."""

    def add(self, chosen: str, rejected: str) -> None:
        """Count a pair."""
        self.pairs += 1
        self.longer += len(chosen) > len(rejected)
        self.chosen_chars += len(chosen)
        self.rejected_chars += len(rejected)

    def figures(self) -> dict[str, Any]:
        """For the record; a share of longer chosen answers far from one half is a bias."""
        n = max(self.pairs, 1)
        return {
            "near_equal": self.near_equal,
            "chosen_longer_share": self.longer / n,
            "chosen_chars": self.chosen_chars / n,
            "rejected_chars": self.rejected_chars / n,
        }


def _preference(row: PairRow, domain: str, unit: float) -> Preference:
    return Preference(
        id=content_id([row.prompt, row.chosen, row.rejected]),
        prompt=row.prompt,
        chosen=row.chosen,
        rejected=row.rejected,
        margin=None if row.margin is None else row.margin / unit,
        domain=domain,
    )


def _answered(state: Path) -> Iterator[tuple[Split, Preference]]:
    for split in SPLITS:
        path = state / ANSWERED.format(split=split)
        for row in read_jsonl(path) if path.exists() else ():
            yield split, cast("Preference", row)
