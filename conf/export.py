"""Settings of the export of a policy for other programs."""

from typing import Annotated, Literal

from conf.launch import LaunchConfig
from conf.settings import RUNTIME, Settings


class ExportConfig(Settings):
    """In which form a policy leaves."""

    target: Literal["hf", "gguf"] = "hf"
    """`hf`: a folder for transformers 4 and 5, vLLM and what reads their layout; `gguf`: one file for
    llama.cpp and what is built on it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the written weights; bf16 halves them and rounds."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the job runs; one process is enough."""
