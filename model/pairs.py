"""The policy's own answers as rejected ones, against the reference answers as chosen.

Worker: `python -m model.pairs JOBFILE`. Writes `answered-train.jsonl` and `answered-held.jsonl` into the
job's state folder; the stage merges them with the pairs of files.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conf.contract import JobFile
from conf.pairs import PairsConfig
from model.dialogues import Renderer
from model.generate import generate_batches
from model.journal import Journal
from model.ranks import Ranks
from model.transformer import Transformer
from model.weights import load_model
from model.worker import run
from storage.checkpoint import TOKENIZER
from storage.conversations import Conversation, read_conversations
from storage.jsonl import SPLITS, Split, content_id
from storage.preferences import Preference
from storage.tokenizer import ChatTokenizer


def main() -> None:
    """Entry of the worker."""
    run(work)


def work(job: JobFile, ranks: Ranks, journal: Journal) -> dict[str, Any]:
    """Answer both sides' prompts, each rank its share; what came of each, in counts."""
    settings = PairsConfig.model_validate(job.settings)
    source = Path(job.inputs["policy"])
    model = load_model(source, device=ranks.device)
    answerer = Answerer(model, ChatTokenizer(source / TOKENIZER), settings, ranks)
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
    """Up to `max_prompts` conversations, drawn by the seed, in their order."""
    if not settings.max_prompts or settings.max_prompts >= len(rows):
        return list(rows)
    key = np.random.SeedSequence((settings.seed, SPLITS.index(split)))
    drawn = np.random.Generator(np.random.Philox(key)).permutation(len(rows))
    return [rows[row] for row in sorted(drawn[: settings.max_prompts].tolist())]


class Answerer:
    """A policy that answers the prompts of conversations."""

    def __init__(
        self, model: Transformer, tokenizer: ChatTokenizer, settings: PairsConfig, ranks: Ranks
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._settings, self._ranks = settings, ranks

    def pairs(
        self, rows: Sequence[Conversation], split: Split
    ) -> tuple[list[Preference], dict[str, int]]:
        """Pairs of the reference answer and the policy's, and why the others were left out."""
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
        pairs: list[Preference] = []
        seen: set[str] = set()
        for (row, _), answer in zip(asked, answers, strict=True):
            pair, reason = self._pair(row, answer)
            if pair is None or pair["id"] in seen:
                counts[reason or "repeated"] += 1
                continue
            seen.add(pair["id"])
            pairs.append(pair)
        counts["kept"] = len(pairs)
        return pairs, {"prompts": len(rows), "answers": len(asked), **counts}

    def _answer(self, prompts: Sequence[Sequence[int]], split: Split) -> list[list[int] | None]:
        """Ids of each answer; none for one that did not end."""
        settings, ranks = self._settings, self._ranks
        own = range(ranks.rank, len(prompts), ranks.world)
        found = generate_batches(
            self._model,
            [prompts[row] for row in own],
            batch_rows=settings.batch_rows,
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

    def _pair(self, row: Conversation, answer: list[int] | None) -> tuple[Preference | None, str]:
        if answer is None:
            return None, "answer_too_long"
        prompt, chosen = row["messages"][:-1], row["messages"][-1]["content"]
        rejected = self._tokenizer.decode(answer).strip()
        if not rejected:
            return None, "answer_empty"
        if rejected == chosen.strip():
            return None, "answer_equal"
        pair = Preference(
            id=content_id([prompt, chosen, rejected]),
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            margin=None,
            domain=row["domain"],
        )
        return pair, ""


def _write(path: Path, pairs: Sequence[Preference]) -> None:
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    draft = path.with_suffix(".draft")
    draft.write_text(text, "utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main()
