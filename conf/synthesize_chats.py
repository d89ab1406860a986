"""Settings of synthesize_chats: questions and answers that a language model writes."""

from typing import Annotated

from pydantic import Field

from conf.synthesize import SynthesizeConfig

QUESTION_PROMPTS = {
    "zh": "请围绕这些主题词提出三个问题并详细回答：{terms}。可以参考下面这段文字：\n\n{example}\n\n"
    "只输出一个 JSON 数组，每项是一个对象，有两个键："
    '"question" 是问题，"answer" 是回答。',
    "en": "Ask three questions about: {terms}, and answer each in detail. The following "
    "passage may guide you:\n\n{example}\n\nGive nothing but a JSON array of objects with the "
    'keys "question" and "answer".',
}


class SynthesizeChatsConfig(SynthesizeConfig):
    """As synthesize; an answer is a JSON list of questions with their answers."""

    prompts: dict[str, str] = QUESTION_PROMPTS
    """Language -> what is asked; `{terms}` and `{example}` as in synthesize. The answer must be a JSON array of
    objects with `question` and `answer`; text around it does not matter."""
    min_chars: Annotated[int, Field(ge=1)] = 10
    """Shorter answers to a question are refused."""
    held_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the questions that is held out; a hash of the question decides."""
