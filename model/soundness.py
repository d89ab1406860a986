"""Whether a policy still speaks: its answers end, and do not say the same over and over."""

from collections.abc import Sequence

from model.generate import generate
from model.transformer import Transformer
from storage.tokenizer import ChatTokenizer

ROWS_AT_ONCE = 32
NGRAM_TOKENS = 4
MOST_REPEATED = 0.5
"""An answer of which more than this share of n-grams was there before repeats itself."""


def soundness(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    tokenizer: ChatTokenizer,
    *,
    max_new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """Shares of answers, sampled at temperature 1, that end, and that also do not repeat themselves; and
    their mean length. Prompts that leave no room for an answer are left out; ValueError where all do."""
    room = model.shape.context - max_new_tokens
    prompts = [prompt for prompt in prompts if len(prompt) <= room]
    if not prompts:
        raise ValueError(
            f"no held-out prompt leaves room for an answer of max_new_tokens={max_new_tokens} in a context of "
            f"{model.shape.context}; lower max_new_tokens, or set gate_answers to 0"
        )
    found = generate(
        model,
        prompts,
        at_once=ROWS_AT_ONCE,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
        eos=tokenizer.im_end,
        pad=tokenizer.pad,
    )
    answers = [found.answer(row) for row in range(len(prompts))]
    ended = found.ended.tolist()
    sound = [
        has_end and repeated_share(answer) <= MOST_REPEATED
        for has_end, answer in zip(ended, answers, strict=True)
    ]
    return {
        "held_sound_share": sum(sound) / len(sound),
        "held_ended_share": sum(ended) / len(ended),
        "held_answer_tokens": sum(map(len, answers)) / len(answers),
    }


def repeated_share(ids: Sequence[int]) -> float:
    """Share of the runs of four tokens that stand earlier in the same answer; 0 for a shorter one."""
    runs = [tuple(ids[at : at + NGRAM_TOKENS]) for at in range(len(ids) - NGRAM_TOKENS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0
