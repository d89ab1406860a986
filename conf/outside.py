"""Settings of the measurement of a model that is not ours."""

from typing import Annotated

from pydantic import Field

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, ModelFolder, Settings


class OutsideConfig(Settings):
    """Which Hugging Face folder is measured on the documents that our checkpoints are measured on."""

    sources: ModelFolder = ()
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
