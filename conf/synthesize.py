"""Settings of synthesize: documents that a language model writes about the corpus' topics."""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from conf.endpoint import EndpointConfig

PLACES = {"terms", "example"}

DOCUMENT_PROMPTS = {
    "zh": "请围绕这些主题词写一段教科书式的讲解：{terms}。写明概念、原因和例子，不少于五百字，"
    "只输出正文。可以参考下面这段文字的内容，但不要抄写：\n\n{example}",
    "en": "Write a textbook-like explanation about: {terms}. State concepts, reasons and "
    "examples in at least 400 words; give nothing but the text. The following passage may "
    "guide you, do not copy it:\n\n{example}",
}


class SynthesizeConfig(EndpointConfig):
    """What a model behind an OpenAI-compatible endpoint is asked, how often, and at what cost at most."""

    count: Annotated[int, Field(ge=1)] = 100
    """Answers to ask for; the topics take turns."""
    prompts: dict[str, str] = DOCUMENT_PROMPTS
    """Language -> what is asked. `{terms}` becomes some terms of the topic, `{example}` the beginning of one of
    its documents. Topics of other languages are left out."""
    terms: Annotated[int, Field(ge=1, le=12)] = 4
    """Terms of the topic that a prompt names, drawn anew for each."""
    example_chars: Annotated[int, Field(ge=0)] = 400
    """Characters of the document that a prompt quotes."""
    min_chars: Annotated[int, Field(ge=1)] = 200
    """Shorter answers are refused."""
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Jaccard similarity to a document of the corpus, or to an earlier answer, from which one is refused."""
    domain: str = "synthetic"
    """Domain of what is written."""
    seed: int = 0
    """Which terms and documents the prompts take."""

    @model_validator(mode="after")
    def _is_askable(self) -> Self:
        for language, prompt in self.prompts.items():
            named = {*re.findall(r"{(\w*)}", prompt)}
            if "terms" not in named or named - PLACES:
                raise ValueError(
                    f"prompts.{language} has the places {sorted(named)}; `{{terms}}` is needed, "
                    "`{example}` may be there, nothing else in braces"
                )
        return self
