"""A model that others made, on our held-out documents; the work is in model/outside.py."""

from conf.outside import OutsideConfig
from storage.jsonl import read_jsonl
from storage.scores import Scores, table_rows
from storage.tokens import Tokens
from tasks.evaluation_figures import document_figures
from tasks.launch import run_worker
from tasks.stage import Job, stage


@stage(version=1, uses_torch=True, headlines={"bits_per_byte/all": "bits per byte"})
def outside(job: Job, tokens: Tokens, settings: OutsideConfig) -> Scores:
    """What the held-out documents cost under a Hugging Face model of any family, with its own tokenizer.

    reads sources, Tokens   writes Scores   cost one forward pass of the documents

    Per byte and character the figures compare with those of `evaluate`, per token they do not: the
    tokens are others. Raises ValueError, through its job, for a model that sees what comes after.
    """
    job.metrics.update(run_worker(job, "model.outside", settings, {"tokens": tokens}))
    files = sorted(job.state.glob("documents-*.jsonl"))
    rows = [row for path in files for row in read_jsonl(path)]
    figures = document_figures(rows)
    Scores.write(job.files, figures)
    if changed := sum(not row["is_restored"] for row in rows):
        job.metrics["changed_documents"] = changed
        job.log.warning(
            "the model's tokenizer does not give back %d of %d documents as they were: their cost is that "
            "of another text, and the figures are no fair comparison",
            changed,
            len(rows),
        )
    job.tables["scores"] = table_rows(figures)
    return Scores(job.path)
