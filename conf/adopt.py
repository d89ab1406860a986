"""Settings of the adoption of a model that others trained."""

from typing import Annotated

from pydantic import Field

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, ModelFolder, Settings


class AdoptConfig(Settings):
    """Which Hugging Face folder becomes a policy."""

    sources: ModelFolder = ()
    """The folder: `config.json` and `*.safetensors` of a Llama, Mistral, Qwen2, Qwen3 or SmolLM3. Its
    tokenizer comes in as the input `tokenizer`, a node whose `adopt` names the same folder."""
    context: Annotated[int, Field(ge=0)] = 0
    """Longest sequence in tokens; 0 for the model's own, more than which it cannot have."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs; one process is enough."""
