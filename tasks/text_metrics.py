"""How like its references a generated text is, and how varied: BLEU, ROUGE, distinct n-grams, repetition.

The unit of all but BLEU is a word of letters and digits, in small letters, or a single Chinese sign;
spaces and punctuation are none.
"""

import re
from collections import Counter
from collections.abc import Sequence

from storage.scores import Figure, mean, resampled

HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
UNIT = re.compile(f"[{HAN}]|[^\\W_{HAN}]+")
REPEATED_N = 4
"""Length of the n-grams whose repetition within an answer is counted (Welleck et al. 2020, rep-4)."""
DISTINCT_N = (1, 2)
"""Lengths of the n-grams that are counted once and as often as they come (Li et al. 2016)."""


def likeness(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Figure]:
    """BLEU over all answers, and means of ROUGE F1 and of exact matches; with several references the best
    counts. Intervals by bootstrap over answers. Raises ValueError for an answer without a reference."""
    if not all(references):
        raise ValueError(
            "an answer has no reference to be compared with; give it one, or leave it out"
        )
    pairs = list(zip(answers, references, strict=True))
    figures = {
        "bleu": bleu(answers, references, tokenize="zh"),
        "bleu_char": bleu(answers, references, tokenize="char"),
        "exact": mean([float(answer.strip() in map(str.strip, of)) for answer, of in pairs]),
    }
    for name in ("rouge_1", "rouge_2", "rouge_l"):
        figures[name] = mean(
            [max(rouge(answer, text)[name] for text in of) for answer, of in pairs]
        )
    return figures


def variety(answers: Sequence[str], is_ended: Sequence[bool]) -> dict[str, Figure]:
    """Distinct n-grams of all answers together, repetition within an answer, and how many ended.

    A distinct share has no interval: drawing answers twice would lower it.
    """
    texts = [units(answer) for answer in answers]
    figures = {
        "repetition": mean([repetition(text) for text in texts]),
        "ended": mean([float(flag) for flag in is_ended]),
    }
    for n in DISTINCT_N:
        grams = [gram for text in texts for gram in _grams(text, n)]
        share = len(set(grams)) / len(grams) if grams else 0.0
        figures[f"distinct_{n}"] = Figure(value=share, n=len(grams), low=share, high=share)
    return figures


def units(text: str) -> list[str]:
    """Words of letters and digits in small letters, and single Chinese signs."""
    return UNIT.findall(text.lower())


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]], *, tokenize: str) -> Figure:
    """BLEU of sacrebleu (Post 2018), 0 to 100; `tokenize` is its `zh` (Chinese signs apart, the rest as
    mteval does) or `char`. Answers may have unequal numbers of references."""
    import numpy as np
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenize)
    rows = [metric.sentence_score(text, of) for text, of in zip(answers, references, strict=True)]
    counts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows])

    def score(chosen: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> float:
        *grams, length, wanted = counts[chosen].sum(0).tolist()
        half = len(grams) // 2
        return metric.compute_bleu(
            grams[:half], grams[half:], length, wanted, smooth_method="exp"
        ).score

    return resampled(len(rows), score)


def rouge(answer: str, reference: str) -> dict[str, float]:
    """F1 of shared units (rouge_1), of pairs of them (rouge_2), of their longest common subsequence
    (rouge_l); Lin 2004."""
    own, wanted = units(answer), units(reference)
    found = {f"rouge_{n}": _f1(_shared(own, wanted, n), own, wanted, n) for n in (1, 2)}
    return {**found, "rouge_l": _f1(_common_length(own, wanted), own, wanted, 1)}


def repetition(text: Sequence[str]) -> float:
    """Share of the 4-grams that came before in the same text; 0 for a text that has none."""
    grams = _grams(text, REPEATED_N)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _shared(own: Sequence[str], wanted: Sequence[str], n: int) -> int:
    return (Counter(_grams(own, n)) & Counter(_grams(wanted, n))).total()


def _f1(shared: int, own: Sequence[str], wanted: Sequence[str], n: int) -> float:
    total = max(len(own) - n + 1, 0) + max(len(wanted) - n + 1, 0)
    return 2 * shared / total if total else 0.0


def _grams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence; cost: both lengths multiplied."""
    best = [0] * (len(other) + 1)
    for left in one:
        diagonal = 0
        for place, right in enumerate(other, 1):
            above = best[place]
            best[place] = diagonal + 1 if left == right else max(above, best[place - 1])
            diagonal = above
    return best[-1]
