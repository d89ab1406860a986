"""lm-eval's HFLM and our scorer on the same token ids: `python exams.py KIND COURSE ANSWER`.

COURSE names `policy` (files of ours), `hf` (its Hugging Face export) and `requests` (as the stage evaluate
writes them). KIND `ours` and `hflm` score them and tell log-probabilities and seconds of the processor;
`rolling` gives whole texts to HFLM and to our adapter for lm-eval.
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BATCH = 16


def main() -> None:
    kind, course, answer = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    torch.set_num_threads(1)
    content = json.loads(Path(course).read_text("utf-8"))
    found = {"ours": ours, "hflm": hflm, "rolling": rolling}[kind](content)
    Path(answer).write_text(json.dumps(found), "utf-8")


def ours(course: dict[str, Any]) -> Any:
    from model.scoring import score_requests
    from model.weights import load_model
    from storage.checkpoint import TOKENIZER
    from storage.tokenizer import ChatTokenizer

    policy = Path(course["policy"])
    model, tokenizer = load_model(policy), ChatTokenizer(policy / TOKENIZER)
    requests = read(course)
    started = time.process_time()
    with torch.inference_mode():
        rows = score_requests(model, tokenizer, requests, BATCH, lambda done, total: None)
    return {"seconds": time.process_time() - started, "logprobs": [row["logprobs"] for row in rows]}


def hflm(course: dict[str, Any]) -> Any:
    from model.scoring import encoded
    from model.weights import ModelCard
    from storage.checkpoint import TOKENIZER
    from storage.tokenizer import ChatTokenizer

    policy = Path(course["policy"])
    tokenizer, context = ChatTokenizer(policy / TOKENIZER), ModelCard.read(policy).shape.context
    model = peer(course, context)
    pairs: list[Any] = []
    counts: list[int] = []
    started = time.process_time()
    for index, request in enumerate(read(course)):
        row = encoded(tokenizer, request, index, context)
        counts.append(len(row.ids))
        for ids, scored in zip(row.ids, row.scored, strict=True):
            pairs.append((("", ""), ids[:-scored], ids[-scored:]))
    values = iter([value for value, _ in model._loglikelihood_tokens(pairs, disable_tqdm=True)])
    seconds = time.process_time() - started
    return {"seconds": seconds, "logprobs": [[next(values) for _ in range(n)] for n in counts]}


def rolling(course: dict[str, Any]) -> Any:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from model.harness import BessemerLM
    from model.weights import ModelCard
    from storage.checkpoint import TOKENIZER
    from storage.tokenizer import ChatTokenizer

    policy = Path(course["policy"])
    tokenizer, context = ChatTokenizer(policy / TOKENIZER), ModelCard.read(policy).shape.context
    theirs, own = peer(course, context), BessemerLM(str(policy), batch_size=BATCH)
    texts = course["texts"]
    wanted: list[float] = []
    for text in texts:
        windows = get_rolling_token_windows(tokenizer.encode(text), tokenizer.eos, context, 1)
        pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
        wanted.append(sum(v for v, _ in theirs._loglikelihood_tokens(pairs, disable_tqdm=True)))
    found = own.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts])
    asked = [SimpleNamespace(args=("猫吃什么？", end)) for end in ("鱼。", " fish", "\n")]
    ids = [own._pair(*request.args) for request in asked]
    pairs = [(("", ""), row[:-count], row[-count:]) for row, count in ids]
    return {
        "ours": found,
        "theirs": wanted,
        "pairs": own.loglikelihood(asked),
        "their_pairs": theirs._loglikelihood_tokens(pairs, disable_tqdm=True),
        "written": own.generate_until(
            [SimpleNamespace(args=("猫", {"until": ["\n"], "max_gen_toks": 4}))]
        ),
    }


def peer(course: dict[str, Any], context: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=course["hf"], device="cpu", dtype="float32", batch_size=BATCH, max_length=context
    )


def read(course: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(course["requests"]).read_text("utf-8").splitlines()]


if __name__ == "__main__":
    main()
