"""Settings of the measurement of a model that is not ours."""

from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings, SourceSpec


class OutsideConfig(Settings):
    """Which Hugging Face folder is measured on the documents that our checkpoints are measured on."""

    sources: tuple[SourceSpec, ...] = ()
    """The folder: `config.json`, `*.safetensors` and the tokenizer of any causal language model that
    transformers (`pip install 'bessemer[outside]'`) knows. None of its own code is run."""
    held_documents: Annotated[int, Field(ge=0)] = 0
    """Held-out documents of each domain that are scored, spread evenly; 0 for all. As in evaluate, so that
    they are the same."""
    stride: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Step between the windows of a long document, as a share of the context."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest window in tokens; 0 for as long as the model's own positions reach."""
    batch: Annotated[int, Field(ge=1), RUNTIME] = 4
    """Windows read together; their logits take batch x context x vocabulary x 4 bytes."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs; several processes share the documents."""

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
