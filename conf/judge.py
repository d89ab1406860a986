"""Settings of judge: a language model says which answers are good, and which of two is better."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from conf.endpoint import EndpointConfig

SCORE_PROMPTS = {
    "zh": "请作为公正的评委，评价下面这个回答的质量：是否正确、切题、有用、通顺。回答的长短不重要。"
    "先用一两句话说明理由，最后一行只写分数，从 1（很差）到 10（很好），格式为 [[分数]]，例如 [[5]]。\n\n"
    "[问题]\n{question}\n\n[回答]\n{answer}",
    "en": "Be an impartial judge of the answer below: is it right, to the point, helpful and well "
    "written? Its length does not matter. Give your reason in a sentence or two, then on the last line "
    "nothing but a score from 1 (very poor) to 10 (very good) as [[score]], for example [[5]].\n\n"
    "[Question]\n{question}\n\n[Answer]\n{answer}",
}
PAIR_PROMPTS = {
    "zh": "请作为公正的评委，比较两个助手对同一个问题的回答，判断哪一个更正确、更切题、更有用。不要受先后"
    "次序和长短的影响。先用一两句话说明理由，最后一行只写结论：A 更好写 [[A]]，B 更好写 [[B]]，不相上下写 "
    "[[C]]。\n\n[问题]\n{question}\n\n[助手 A 的回答]\n{first}\n\n[助手 B 的回答]\n{second}",
    "en": "Be an impartial judge of two assistants' answers to the same question: which one is more "
    "correct, more to the point and more helpful? Neither order nor length may sway you. Give your reason "
    "in a sentence or two, then on the last line nothing but the verdict: [[A]] if A is better, [[B]] if B "
    "is better, [[C]] for a tie.\n\n[Question]\n{question}\n\n[Answer of assistant A]\n{first}\n\n"
    "[Answer of assistant B]\n{second}",
}


class JudgeConfig(EndpointConfig):
    """What a judge behind an OpenAI-compatible endpoint is asked about answers, and at what cost at most."""

    modes: tuple[Literal["score", "pairs"], ...] = ("score", "pairs")
    """`score` asks for 1 to 10 of every answer, `pairs` for the better of two, in both orders."""
    baseline: str = ""
    """Name of the answers that all others are compared with; empty for every two."""
    questions: Annotated[int, Field(ge=0)] = 0
    """First questions that are judged; 0 for all that every checkpoint has answered."""
    score_prompts: dict[str, str] = SCORE_PROMPTS
    """Language of the question (`zh` or `en`) -> what is asked, with the places `{question}` and `{answer}`. The
    answer must hold `[[score]]`."""
    pair_prompts: dict[str, str] = PAIR_PROMPTS
    """The same for two answers, with `{question}`, `{first}` and `{second}`; the answer must hold `[[A]]`, `[[B]]`
    or, for a tie, `[[C]]`."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Of the endpoint's sampling."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 512
    """Tokens that a verdict with its reason may have."""

    @model_validator(mode="after")
    def _is_askable(self) -> Self:
        wanted = {
            "score_prompts": (self.score_prompts, {"question", "answer"}),
            "pair_prompts": (self.pair_prompts, {"question", "first", "second"}),
        }
        for setting, (prompts, places) in wanted.items():
            if prompts.keys() != {"zh", "en"}:
                raise ValueError(
                    f"{setting} has {sorted(prompts)}; give it one for zh and one for en"
                )
            for language, prompt in prompts.items():
                if (named := {*re.findall(r"{(\w+)}", prompt)}) != places:
                    raise ValueError(
                        f"{setting}.{language} has the places {sorted(named)}; it needs {sorted(places)}"
                    )
        return self
