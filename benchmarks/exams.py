"""Five-shot C-Eval, letters and whole options, against lm-eval's HFLM on the very same token ids.

Both in float32 with one thread, each in a process of its own in the environment of lm-eval, by turns;
seconds are those of the processor. Without DATA, which has the exam, there is no row.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.work import Row, Work, environment, run_peer, run_stage
from conf.shape import ShapeConfig
from conf.tokenizer import TokenizerConfig
from model.convert import write_hf
from model.transformer import Transformer
from model.weights import load_model, save_model
from storage.checkpoint import TOKENIZER
from tasks.exams import Request, exam_requests, read_questions
from tasks.tokenizer import tokenizer as tokenizer_stage

PACKAGES = ("torch==2.13.0", "transformers==5.23.0", "lm-eval==0.4.13", "accelerate", "pydantic")
SHAPE = ShapeConfig(dim=384, layers=8, heads=6, kv_heads=2, ffn=1024, context=2048)
SUBJECTS, QUESTIONS = 4, 8
TURNS = 2
"""Of both; the better one counts."""


def measure(work: Work) -> list[Row]:
    """Questions per second of the processor, for each kind of scoring."""
    if work.data is None:
        return []
    folder = work.folder / "exams"
    settings = TokenizerConfig(vocabulary=8192)
    words = run_stage(tokenizer_stage, settings, {"corpus": work.corpus}, work.folder)
    model = Transformer(SHAPE, 8192, seed=0)
    save_model(folder / "policy", model, role="policy", tokenizer=words.files)
    rows: list[Row] = []
    for kind in ("letter", "option"):
        requests = ceval(work.data, [kind])[: SUBJECTS * QUESTIONS]
        seconds = {"ours": float("inf"), "hflm": float("inf")}
        for _ in range(TURNS):
            found = scored_by_both(folder, folder / "policy", requests)
            seconds = {name: min(value, found[name]["seconds"]) for name, value in seconds.items()}
        rates = {name: len(requests) / value for name, value in seconds.items()}
        title = f"5-shot C-Eval, {kind}s, {SHAPE.parameters(8192) / 1e6:.0f}M parameters"
        rows.append(Row(title, "HFLM", rates["ours"], rates["hflm"], "questions/s", 6, 4))
    return rows


def ceval(data: Path, scoring: Sequence[Any], *, questions: int = QUESTIONS) -> list[Request]:
    """So many questions of each subject of C-Eval's val, 0 for all, with five of its dev before them."""
    folder = data / "eval" / "ceval"
    examples = [q for path in sorted((folder / "dev").glob("*.csv")) for q in read_questions(path)]
    asked = [
        question
        for path in sorted((folder / "val").glob("*.csv"))
        for question in read_questions(path)[: questions or None]
    ]
    return exam_requests(asked, examples, preset="ceval", shots=5, scoring=scoring)


def scored_by_both(
    folder: Path, policy: Path, requests: Sequence[Request]
) -> dict[str, dict[str, Any]]:
    """`seconds` and `logprobs` of ours and of HFLM."""
    course = write_course(folder, policy, requests=requests)
    python = environment("exams", PACKAGES)
    return {
        name: run_peer(python, "exams", folder, [name, str(course)]) for name in ("ours", "hflm")
    }


def write_course(
    folder: Path, policy: Path, *, requests: Sequence[Request] = (), texts: Sequence[str] = ()
) -> Path:
    """What `peers/exams.py` is given; the policy is exported for transformers beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_hf(folder / "hf", load_model(policy), policy / TOKENIZER)
    lines = (json.dumps(asdict(request), ensure_ascii=False) + "\n" for request in requests)
    (folder / "requests.jsonl").write_text("".join(lines), "utf-8")
    course = {
        "policy": str(policy),
        "hf": str(folder / "hf"),
        "requests": str(folder / "requests.jsonl"),
        "texts": list(texts),
    }
    (folder / "course.json").write_text(json.dumps(course, ensure_ascii=False), "utf-8")
    return folder / "course.json"
