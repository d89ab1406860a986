"""Stage audit: what the data stages removed and kept, against what the demo world planted."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.audit import AuditConfig
from storage.corpus import Corpus
from storage.scores import Figure, Scores, mean, share
from storage.world import World
from tasks.stage import Job, stage
from tasks.world_overlap import OverlapIndex, shingles_of, tokens_of

ROLES = ("extract", "filter", "dedup", "decontaminate")
JUNK = ("short", "repetitive", "garbage", "boilerplate", "other_language", "blocked")
COPIES = ("exact_copy", "near_copy")


@dataclass(frozen=True)
class Passage:
    """What one data stage did, by URL."""

    kept: frozenset[str]
    dropped: Mapping[str, str]
    """URL -> why; only what this stage dropped, not what an earlier one did."""

    @property
    def reached(self) -> frozenset[str]:
        """Pages that this stage had to decide on."""
        return self.kept | self.dropped.keys()


@stage(
    version=2,
    headlines={
        "junk/removed": "planted junk removed",
        "sound/lost": "good pages lost",
        "copies/exact_removed": "exact copies removed",
        "copies/near_removed": "near copies removed",
        "copies/precision": "drops that were copies",
        "copies/distinct_kept": "distinct pages kept",
        "leaks/removed": "exam leaks removed",
    },
)
def audit(job: Job, world: World, corpora: dict[str, Corpus], settings: AuditConfig) -> Scores:
    """Judge the data stages by planted truth; each stage by the pages that reached it.

    `corpora` names stages: extract, filter, dedup, decontaminate; what is missing is not judged, but
    without dedup the copies that are left at the end are counted.
    reads World, Corpus   writes Scores   cost 1 s per 3,000 pages
    """
    if unknown := sorted(corpora.keys() - set(ROLES)):
        raise ValueError(
            f"audit.corpora names {', '.join(unknown)}; expected some of {', '.join(ROLES)}; "
            "name each corpus after the stage that it shows"
        )
    truth = {page["url"]: page for page in world.pages()}
    passages = {role: _passage(corpora[role]) for role in ROLES if role in corpora}
    mistakes: list[dict[str, Any]] = []
    figures = dict(_figures(truth, passages, corpora, settings, mistakes))
    Scores.write(job.files, figures)
    job.metrics.update({name: figure.model_dump() for name, figure in figures.items()})
    job.tables["pages"] = _funnel(truth, passages)
    job.tables["figures"] = [
        {"figure": name, "value": figure.text()} for name, figure in figures.items()
    ]
    _write_mistakes(job, mistakes, settings.mistakes)
    return Scores(job.path)


def _passage(corpus: Corpus) -> Passage:
    kept: set[str] = set()
    dropped: dict[str, str] = {}
    for shard, frame in zip(corpus.shards, corpus.scan(["url"], kept_only=False), strict=True):
        decisions = shard.decisions()
        rows = zip(frame["url"], decisions["keep"], decisions["reason"], strict=True)
        for url, is_kept, reason in rows:
            if is_kept:
                kept.add(url)
            elif reason is not None:
                dropped[url] = reason
    return Passage(frozenset(kept), dropped)


Truth = Mapping[str, Mapping[str, Any]]
Mistakes = list[dict[str, Any]]


def _figures(
    truth: Truth,
    passages: Mapping[str, Passage],
    corpora: Mapping[str, Corpus],
    settings: AuditConfig,
    mistakes: Mistakes,
) -> Iterator[tuple[str, Figure]]:
    def judge(name: str, urls: list[str], is_right: Callable[[str], bool]) -> Figure:
        wrong = [url for url in urls if not is_right(url)]
        mistakes.extend({"figure": name, **truth.get(url, {"url": url})} for url in wrong)
        return share(len(urls) - len(wrong), len(urls))

    if "extract" in passages:
        yield from _extract_figures(truth, passages["extract"], corpora["extract"], judge)
    if clean := passages.get("filter", passages.get("extract")):
        yield from _junk_figures(truth, clean, judge)
    if "dedup" in passages:
        reached = passages["dedup"].reached
        yield from _copy_figures(truth, reached, passages["dedup"].kept, settings, judge)
        yield from _overlap_figures(
            passages["dedup"], corpora["dedup"], settings.copy_similarity, judge
        )
    elif last := passages.get("decontaminate"):
        # Copies that nothing was there to remove, among what would have reached dedup.
        yield from _copy_figures(truth, last.reached, last.kept, settings, judge)
    if "decontaminate" in passages:
        yield from _leak_figures(truth, passages["decontaminate"], judge)


Judge = Callable[[str, list[str], Callable[[str], bool]], Figure]


def _extract_figures(
    truth: Truth, passage: Passage, corpus: Corpus, judge: Judge
) -> Iterator[tuple[str, Figure]]:
    """Sound pages found, blocked ones left alone, and how well the main text was cut out."""
    sound = [url for url, page in truth.items() if page["kind"] not in JUNK]
    name = "extract/sound_found"
    yield name, judge(name, sound, lambda url: url in passage.kept)
    f1 = [
        _token_f1(text, truth[url]["text"])
        for url, text in _texts(corpus, passage.kept)
        if url in truth and truth[url]["kind"] not in JUNK
    ]
    if f1:
        yield "extract/text_f1", mean(f1)


def _junk_figures(truth: Truth, clean: Passage, judge: Judge) -> Iterator[tuple[str, Figure]]:
    """Junk that is gone after the filter, together and by kind; sound pages that are gone, too."""
    junk = [url for url, page in truth.items() if page["kind"] in JUNK]
    yield "junk/removed", judge("junk/removed", junk, lambda url: url not in clean.kept)
    for kind in JUNK:
        urls = [url for url in junk if truth[url]["kind"] == kind]
        yield f"junk/{kind}_removed", share(sum(url not in clean.kept for url in urls), len(urls))
    sound = [url for url, page in truth.items() if page["kind"] not in JUNK]
    kept = judge("sound/kept", sound, lambda url: url in clean.kept)
    yield "sound/lost", share(round((1 - kept.value) * kept.n), kept.n)


def _copy_figures(
    truth: Truth,
    reached: frozenset[str],
    kept: frozenset[str],
    settings: AuditConfig,
    judge: Judge,
) -> Iterator[tuple[str, Figure]]:
    """Of every planted copy that reached dedup together with what it copies: gone, or kept?

    A copy is removed when one of the two is gone: which of them came first is not dedup's to say.
    """
    copies = [
        url
        for url, page in truth.items()
        if page["kind"] in COPIES and url in reached and page["of_url"] in reached
    ]

    def is_single(url: str) -> bool:
        return not (url in kept and truth[url]["of_url"] in kept)

    def between(low: float, high: float) -> list[str]:
        return [url for url in copies if low <= truth[url]["jaccard"] < high]

    exact = [url for url in copies if truth[url]["kind"] == "exact_copy"]
    near = [url for url in between(settings.copy_similarity, 1.0) if url not in exact]
    distinct = between(settings.distinct_low, settings.distinct_high)
    for name, urls in (("copies/exact_removed", exact), ("copies/near_removed", near)):
        yield name, judge(name, urls, is_single)
    name = "copies/distinct_kept"
    yield name, judge(name, distinct, lambda url: not is_single(url))


def _overlap_figures(
    passage: Passage, corpus: Corpus, similarity: float, judge: Judge
) -> Iterator[tuple[str, Figure]]:
    """By exact comparison of the texts as they reached dedup: wrong drops, copies left over."""
    kept, index = {}, OverlapIndex()
    for url, text in _texts(corpus, passage.kept):
        kept[url] = shingles_of(text)
        index.add(url, kept[url])
    dropped = {url: shingles_of(text) for url, text in _texts(corpus, passage.dropped.keys())}
    name = "copies/precision"
    yield (
        name,
        judge(name, list(dropped), lambda url: index.nearest(dropped[url])[0] >= similarity),
    )
    name = "copies/alone"
    yield (
        name,
        judge(name, list(kept), lambda url: index.nearest(kept[url], (url,))[0] < similarity),
    )


def _leak_figures(truth: Truth, passage: Passage, judge: Judge) -> Iterator[tuple[str, Figure]]:
    """Leaks that are gone, and all other pages that decontaminate had to leave alone."""
    leaks = [url for url, page in truth.items() if page["kind"] == "leak"]
    name = "leaks/removed"
    yield name, judge(name, leaks, lambda url: url not in passage.kept)
    met = [url for url in leaks if url in passage.reached]
    yield "leaks/recall", share(sum(url in passage.dropped for url in met), len(met))
    others = sorted(passage.reached - set(leaks))
    name = "leaks/others_kept"
    yield name, judge(name, others, lambda url: url in passage.kept)


def _texts(corpus: Corpus, urls: frozenset[str] | Any) -> Iterator[tuple[str, str]]:
    for frame in corpus.scan(["url", "text"], kept_only=False, is_cut=False):
        for url, text in zip(frame["url"], frame["text"], strict=True):
            if url in urls:
                yield url, text


def _token_f1(found: str, wanted: str) -> float:
    """Harmonic mean of precision and recall over tokens, counted with repetition."""
    left, right = Counter(tokens_of(found)), Counter(tokens_of(wanted))
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def _funnel(truth: Truth, passages: Mapping[str, Passage]) -> list[dict[str, Any]]:
    planted = Counter(page["kind"] for page in truth.values())
    left = {
        role: Counter(truth[url]["kind"] for url in passage.kept if url in truth)
        for role, passage in passages.items()
    }
    return [
        {"kind": kind, "planted": count, **{role: left[role][kind] for role in left}}
        for kind, count in sorted(planted.items())
    ]


def _write_mistakes(job: Job, mistakes: Mistakes, limit: int) -> None:
    shown: Counter[str] = Counter()
    job.logs.mkdir(parents=True, exist_ok=True)
    with (job.logs / "mistakes.jsonl").open("w", encoding="utf-8") as stream:
        for mistake in mistakes:
            shown[mistake["figure"]] += 1
            if shown[mistake["figure"]] <= limit:
                stream.write(json.dumps(mistake, ensure_ascii=False) + "\n")
