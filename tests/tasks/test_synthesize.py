"""A model behind an endpoint that fails, stalls and talks nonsense: every answer is asked once and paid once."""

import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from conf.synthesize import SynthesizeConfig
from conf.synthesize_chats import SynthesizeChatsConfig
from conf.topics import TopicsConfig
from storage.conversations import Conversations
from storage.corpus import Corpus
from storage.topics import Topics
from tasks.completions import ANSWERS, EndpointFailed
from tasks.stage import Job
from tasks.synthesis import questions
from tasks.synthesize import ASKED, synthesize
from tasks.synthesize_chats import pairs_of, synthesize_chats
from tasks.topics import topics
from tests.storage.corpora import corpus_of
from tests.tasks.corpus_runs import texts
from tests.tasks.endpoint_stand_in import Reply, completion, endpoint
from tests.tasks.text_jobs import digest_of, job_at

ENGLISH = ["boat", "harbour", "anchor", "captain", "deck", "mast", "tide", "storm", "sail", "crew"]
CHINESE = ["医生", "病人", "手术", "药物", "护士", "诊断", "治疗", "医院", "健康", "检查"]


def essay(language: str, seed: str) -> str:
    rng = random.Random(seed)
    if language == "zh":
        return "，".join("".join(rng.choices(CHINESE, k=4)) for _ in range(40)) + "。"
    return "The " + " and the ".join(rng.choices(ENGLISH, k=80)) + "."


def language_of_prompt(prompt: str) -> str:
    return "zh" if any("\u4e00" <= c <= "\u9fff" for c in prompt[:10]) else "en"


def good(prompt: str, times: int) -> Reply:
    return completion(essay(language_of_prompt(prompt), prompt))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    documents = [
        {"text": essay(language, f"{language}{i}"), "language": language, "url": f"{i}"}
        for i in range(20)
        for language in ("en", "zh")
    ]
    return corpus_of(tmp_path_factory.mktemp("corpus"), [documents[:25], documents[25:]])


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Topics:
    job = job_at(tmp_path_factory.mktemp("topics"), "t")
    topics(job, corpus=corpus, settings=TopicsConfig(topics=2, max_term_share=1))
    return Topics(job.path)


def config(url: str, **fields: Any) -> SynthesizeConfig:
    return SynthesizeConfig(model="m", base_url=url, **{"count": 8, "wait_seconds": 5.0, **fields})


def made_by(job: Job, corpus: Corpus, subjects: Topics, settings: SynthesizeConfig) -> Corpus:
    """The result, with its new part beside it, as in a store."""
    made = synthesize(job, corpus=corpus, topics=subjects, settings=settings)
    for part in job.parts:
        if not (beside := job.path.parent / part).exists():
            found = job.store.find(part)
            assert found is not None
            beside.symlink_to(found)
    return made


def test_new_documents_are_a_landing_of_their_own(
    tmp_path: Path, corpus: Corpus, subjects: Topics
) -> None:
    with endpoint(good) as (url, asked):
        job = job_at(corpus.path.parent, "made")
        made = made_by(job, corpus, subjects, config(url))
    assert sorted(asked.values()) == [1] * 8
    assert texts(made)[:40] == texts(corpus)
    shard = made.shards[-1]
    assert (len(made.shards), shard.landing, shard.rows) == (3, 1, 8)
    rows = shard.read().to_dicts()
    assert {row["split"] for row in rows} == {"train"}
    assert Counter(row["language"] for row in rows) == {"en": 4, "zh": 4}
    assert {row["domain"] for row in rows} == {"synthetic"}
    assert set(job.parts) == {shard.entry.part for shard in made.shards}
    assert (job.metrics["documents"], job.metrics["tokens"]) == (8, 800)
    assert job.metrics["host"] == url.split("/")[2]


def test_prompts_name_terms_and_documents_of_one_topic(corpus: Corpus, subjects: Topics) -> None:
    settings = config("http://x", count=6, prompts={"en": "{terms}|{example}"})
    asks = questions(corpus, subjects, settings)
    assert len({ask.prompt for ask in asks}) == 6
    for ask in asks:
        terms, example = ask.prompt.split("|")
        assert set(terms.split(", ")) <= {*ENGLISH, "the", "and"}
        assert any(text.startswith(example) for text in texts(corpus))
    assert asks == questions(corpus, subjects, settings)
    assert asks != questions(corpus, subjects, settings.model_copy(update={"seed": 1}))


def test_what_is_no_new_document_is_refused(
    tmp_path: Path, corpus: Corpus, subjects: Topics
) -> None:
    numbers: dict[str, int] = {}
    lock = threading.Lock()
    known = texts(corpus)[0]
    replies = [
        completion("The short."),
        completion(essay("zh", "other")),
        completion(essay("en", "cut"), "length"),
        completion(known + " boat"),
        completion(essay("en", "twice")),
        completion(essay("en", "twice") + " again"),
    ]

    def script(prompt: str, times: int) -> Reply:
        with lock:
            return replies[numbers.setdefault(prompt, len(numbers))]

    with endpoint(script) as (url, _):
        job = job_at(corpus.path.parent, "refused")
        settings = config(url, count=6, concurrency=1, prompts={"en": "{terms} {example}"})
        made = made_by(job, corpus, subjects, settings)
    refused = {"cut_off": 1, "language": 1, "repeated": 2, "too_short": 1}
    assert job.metrics["refused"] == refused
    assert texts(made)[40:] == [essay("en", "twice")]
    rows = [json.loads(line) for line in (job.files / ASKED).read_text("utf-8").splitlines()]
    assert Counter(row["refused"] for row in rows) == {**refused, None: 1}


def test_failures_are_asked_again_and_nonsense_is_no_document(
    tmp_path: Path, corpus: Corpus, subjects: Topics
) -> None:
    bad: list[Reply] = [
        (500, {}),
        (429, {}),
        (200, b"<html>"),
        (200, {"choices": []}),
        completion(None),
        (200, b"late"),
    ]
    places: dict[str, int] = {}

    def script(prompt: str, times: int) -> Reply:
        place = places.setdefault(prompt, len(places))
        if place == 7:
            return completion("")  # never an answer
        if times > 1 or place == 6:
            return good(prompt, times)
        if bad[place][1] == b"late":
            time.sleep(1.0)
        return bad[place]

    with endpoint(script) as (url, asked):
        job = job_at(corpus.path.parent, "failing")
        settings = config(url, concurrency=1, wait_seconds=0.5, attempts=3)
        synthesize(job, corpus=corpus, topics=subjects, settings=settings)
    assert sorted(asked.values()) == [1, 2, 2, 2, 2, 2, 2, 3]
    assert job.metrics["documents"] == 7
    assert job.metrics["refused"] == {"no_text": 1}
    assert job.metrics["requests"] == 16


def test_a_resumed_stage_asks_nothing_twice_and_gives_the_same_bytes(
    tmp_path: Path, corpus: Corpus, subjects: Topics
) -> None:
    def dying(prompt: str, times: int) -> Reply:
        with lock:
            served.append(prompt)
            return good(prompt, times) if len(served) <= 5 else (401, {"error": "no"})

    lock, served = threading.Lock(), list[str]()
    job = job_at(corpus.path.parent, "resumed")
    with endpoint(dying) as (url, _), pytest.raises(EndpointFailed, match=r"status 401.*kept"):
        synthesize(job, corpus=corpus, topics=subjects, settings=config(url, concurrency=1))
    with (job.state / ANSWERS).open("ab") as stream:
        stream.write(b'{"key": "torn')
    with endpoint(good) as (url, asked):
        synthesize(job, corpus=corpus, topics=subjects, settings=config(url))
        assert asked.total() == 3
        assert not set(asked) & set(served[:5])
        other = job_at(corpus.path.parent, "whole")
        synthesize(other, corpus=corpus, topics=subjects, settings=config(url))
    assert digest_of(job.files) == digest_of(other.files)


@pytest.mark.parametrize("budget", [{"max_requests": 3}, {"max_total_tokens": 1_550}])
def test_the_budget_is_never_exceeded(
    tmp_path: Path, corpus: Corpus, subjects: Topics, budget: dict[str, int]
) -> None:
    # A request sets 1,300 + fewer than 20 tokens apart and uses 100: with 1,550 the first three fit
    # (1,550, 1,450, 1,350 are left before them), the fourth does not.
    with endpoint(good) as (url, asked):
        job = job_at(corpus.path.parent, f"budget-{len(budget)}-{min(budget.values())}")
        prompts = {"en": "{terms}"}
        settings = config(
            url, concurrency=1, max_answer_tokens=1_300, terms=1, prompts=prompts, **budget
        )
        made = synthesize(job, corpus=corpus, topics=subjects, settings=settings)
    assert asked.total() == job.metrics["requests"] == 3
    assert job.metrics["is_budget_spent"]
    assert made.shards[-1].rows <= 3


def test_a_key_is_named_and_never_kept(
    tmp_path: Path, corpus: Corpus, subjects: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_at(corpus.path.parent, "key")
    with pytest.raises(ValueError, match=r"SECRET_NAME .*not set"):
        synthesize(
            job,
            corpus=corpus,
            topics=subjects,
            settings=config("http://127.0.0.1:9", key_variable="SECRET_NAME"),
        )
    monkeypatch.setenv("SECRET_NAME", "s3cret")
    with (
        endpoint(lambda prompt, times: (403, {"error": "denied"})) as (url, _),
        pytest.raises(EndpointFailed) as raised,
    ):
        synthesize(
            job,
            corpus=corpus,
            topics=subjects,
            settings=config(url, key_variable="SECRET_NAME"),
        )
    assert "s3cret" not in str(raised.value)
    assert not any(b"s3cret" in path.read_bytes() for path in job.path.rglob("*") if path.is_file())


def test_questions_become_conversations(tmp_path: Path, corpus: Corpus, subjects: Topics) -> None:
    def script(prompt: str, times: int) -> Reply:
        if language_of_prompt(prompt) == "zh":
            return completion("对不起，我不能回答。")
        rows: list[Any] = [
            {
                "question": f"What is a boat, part {len(prompt)} {prompt[-9:]}? \ud83d",
                "answer": essay("en", prompt),
            },
            {"question": "Why?", "answer": "No."},
            "nothing",
        ]
        # Halves of an emoji: of what the model says, and in the JSON that it writes.
        return completion("Here \ude00:\n```json\n" + json.dumps(rows) + "\n```")

    with endpoint(script) as (url, _):
        job = job_at(tmp_path, "chats")
        settings = SynthesizeChatsConfig(model="m", base_url=url, count=6, held_share=0.5)
        made = synthesize_chats(job, corpus=corpus, topics=subjects, settings=settings)
    assert isinstance(made, Conversations)
    rows = [row for split in ("train", "held") for row in made.rows(split)]
    assert len(rows) == job.metrics["train"] + job.metrics["held"] == 3
    assert {row["language"] for row in rows} == {"en"}
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
    assert rows[0]["messages"][0]["content"].endswith("? \ufffd")
    assert job.metrics["refused"] == {"no_pairs": 3, "too_short": 3}
    assert list(pairs_of('[{"question": 1, "answer": "a"}] and ]')) == []


def test_an_empty_corpus_asks_nothing(tmp_path: Path) -> None:
    empty = corpus_of(tmp_path, [])
    job = job_at(tmp_path, "topics")
    topics(job, corpus=empty, settings=TopicsConfig())
    made = synthesize(
        job_at(tmp_path, "a"),
        corpus=empty,
        topics=Topics(job.path),
        settings=config("http://127.0.0.1:9"),
    )
    assert made.shards == []


def test_prompts_name_their_places() -> None:
    for prompt in ("no place", "{terms} {other}"):
        with pytest.raises(ValidationError, match=r"prompts\.en has the places"):
            SynthesizeConfig(model="m", prompts={"en": prompt})
