"""A policy as a model of lm-eval (`pip install 'bessemer[lm-eval]'`), with all of lm-eval's own options:
`python -m model.harness run --model bessemer --model_args policy=FOLDER --tasks ...`. FOLDER is `files` of
the policy's artifact. Texts are scored as the stage evaluate scores them: behind pretraining's separator.
"""

# lm-eval brings 63 packages: it is no part of our own environment, and unknown to the type checker there.
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedClassDecorator=false

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from model.documents import document_nats, own_reader
from model.generate import generate
from model.scoring import NO_LABEL, padded
from model.weights import load_model
from storage.checkpoint import TOKENIZER
from storage.tokenizer import ChatTokenizer


@register_model("bessemer")
class BessemerLM(LM):
    """What lm-eval asks of a language model, answered by a policy."""

    def __init__(
        self, policy: str, batch_size: int | str = 16, device: str = "cpu", max_gen_toks: int = 256
    ) -> None:
        super().__init__()
        folder = Path(policy)
        self._model = load_model(folder, device=device)
        self._tokenizer = ChatTokenizer(folder / TOKENIZER)
        self._batch = int(batch_size) if str(batch_size).isdigit() else 16
        self._longest = int(max_gen_toks)

    @torch.inference_mode()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation behind its context, in nats, and whether each of its tokens
        is the likeliest one."""
        rows = [self._pair(*request.args) for request in requests]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            found |= zip(places, self._scored([rows[place] for place in places]), strict=True)
        return [found[place] for place in range(len(rows))]

    @torch.inference_mode()
    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text: every token once, the last window with a full context."""
        texts = [self._tokenizer.encode(request.args[0]) for request in requests]
        reader = own_reader(self._model, self._tokenizer.eos)
        nats = document_nats(
            reader, texts, stride=1.0, batch=self._batch, report=lambda done, total: None
        )
        return [-value for value in nats]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The likeliest continuation of each context, up to the first of its `until` texts."""
        return [self._continued(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both behind the separator, cut from the left to the model's context, and how many of the
        last ones are scored. White space between the two belongs to the continuation, as for lm-eval."""
        bare = context.rstrip()
        whole = self._tokenizer.encode(context + continuation)
        scored = max(1, len(whole) - len(self._tokenizer.encode(bare)))
        ids = [self._tokenizer.eos, *whole]
        return ids[-(self._model.shape.context + 1) :], min(scored, self._model.shape.context)

    def _scored(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        ids, labels = padded(
            [row[:-1] for row, _ in rows],
            [[NO_LABEL] * (len(row) - 1 - count) + row[-count:] for row, count in rows],
            self._model.embedding.weight.device,
        )
        hidden = self._model.hidden(ids)  # (B, T, D)
        places = labels != NO_LABEL
        logprobs = self._model.logits(hidden[places]).float().log_softmax(-1)  # (labels, V)
        wanted = labels[places]
        each = logprobs.gather(1, wanted[:, None])[:, 0].double()
        is_best = logprobs.argmax(-1) == wanted
        counts = places.sum(1).tolist()
        return [
            (float(values.sum()), bool(best.all()))
            for values, best in zip(each.split(counts), is_best.split(counts), strict=True)
        ]

    def _continued(self, context: str, options: dict[str, Any]) -> str:
        room = self._model.shape.context
        length = min(int(options.get("max_gen_toks", self._longest)), room // 2)
        ids = [self._tokenizer.eos, *self._tokenizer.encode(context)][-(room - length) :]
        made = generate(
            self._model,
            [ids],
            max_new_tokens=length,
            temperature=0.0,
            seed=0,
            eos=self._tokenizer.eos,
            pad=self._tokenizer.pad,
        )
        text = self._tokenizer.decode(made.answer(0))
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0]
        return text


if __name__ == "__main__":
    cli_evaluate()
