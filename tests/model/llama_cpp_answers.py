"""What llama.cpp makes of a GGUF file: `python llama_cpp_answers.py FILE ASKED.json ANSWER.json`.

Runs in an environment of its own with xllamacpp, which is llama.cpp in one wheel. ASKED has `text` and
`ids`; the answer has the `tokens` of the text, and `logprobs` of every token behind the ids, by id.
"""

import importlib
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def main() -> None:
    """Load the file and ask."""
    model, asked, answer = sys.argv[1:]
    question = json.loads(Path(asked).read_text("utf-8"))
    llama = importlib.import_module("xllamacpp")
    options = llama.CommonParams()
    options.model.path = model
    options.n_ctx, options.n_parallel, options.warmup = 64, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    # By default it keeps keys and values in float16.
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(options)

    def ask(path: str, **content: Any) -> Any:
        body = json.dumps(content).encode()
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, body, header)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    cut = ask("/tokenize", content=question["text"], add_special=False, parse_special=False)
    [letter] = ask("/tokenize", content="a")["tokens"]
    # It tells no probabilities of an answer without text; theirs are those of the model, whatever is chosen.
    made = ask(
        "/completion",
        prompt=question["ids"], n_predict=1, n_probs=question["vocabulary"], logit_bias=[[letter, 100.0]],
    )  # fmt: skip
    logprobs = {
        row["id"]: row["logprob"] for row in made["completion_probabilities"][0]["top_logprobs"]
    }
    Path(answer).write_text(
        json.dumps(
            {"tokens": cut["tokens"], "logprobs": [logprobs[token] for token in sorted(logprobs)]}
        ),
        "utf-8",
    )


if __name__ == "__main__":
    main()
