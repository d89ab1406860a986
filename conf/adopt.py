"""Settings of the adoption of a model that others trained."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings, SourceSpec


class AdoptConfig(Settings):
    """Which Hugging Face folder becomes a policy."""

    sources: tuple[SourceSpec, ...] = ()
    """The folder: `config.json` and `*.safetensors` of a Llama, Mistral, Qwen2, Qwen3 or SmolLM3. Its
    tokenizer comes in as the input `tokenizer`, a node whose `adopt` names the same folder."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest sequence in tokens; 0 for the model's own, more than which it cannot have."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs; one process is enough."""

    @field_validator("sources")
    @classmethod
    def _raw(cls, sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
        # Files of a model are told apart by their names; no layout of documents applies.
        return tuple(spec.model_copy(update={"format": "text"}) for spec in sources)

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        if not self.sources:
            raise ValueError("sources names no folder; give sources: [{path: FOLDER}]")
        return self
