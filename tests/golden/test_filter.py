"""What filter decides is held by digests: a change needs a new stage version.

After a change on purpose: raise `version` of the stage, then take over the digests that the test shows.
"""

import hashlib
from pathlib import Path

from conf.filter import FilterConfig
from storage.corpus import Corpus
from tasks.filter import filter  # noqa: A004 - the stage's word
from tasks.length_outliers import LENGTHS
from tests.golden.test_text_stages import documents
from tests.storage.corpora import corpus_of
from tests.tasks.test_filter import GOOD, JUNK
from tests.tasks.text_jobs import job_at


def test_decisions_and_lengths_are_golden(tmp_path: Path) -> None:
    rows = documents()
    for language in ("en", "zh"):
        texts = [*GOOD[language], *JUNK[language]]
        rows += [{"text": text, "language": language} for text in texts]
    job = job_at(tmp_path, "f")
    filter(job, corpus_of(tmp_path, [rows[:40], rows[40:]]), FilterConfig(outlier_min_documents=5))
    decisions = [shard.decisions().rows() for shard in Corpus(job.path).shards]
    assert hashlib.sha256(repr(decisions).encode()).hexdigest()[:16] == "dbe53ead35186631"
    assert hashlib.sha256((job.files / LENGTHS).read_bytes()).hexdigest()[:16] == "ef6a6901d37c45a8"
