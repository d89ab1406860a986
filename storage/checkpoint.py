"""Models as artifacts: a policy, a reward model, and a policy exported for other programs."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from conf.shape import ShapeConfig
from storage.artifact import Artifact

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer"
REWARD = "reward.json"


class ModelCard(BaseModel):
    """`config.json` of a model: everything needed to build it, and whose tokens it speaks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: ShapeConfig
    vocabulary: int
    role: Literal["policy", "reward", "value"]
    tokenizer_digest: str
    parameters: int

    @classmethod
    def read(cls, files: Path) -> "ModelCard":
        """The card in the folder `files` of a model artifact. Raises FileNotFoundError."""
        return cls.model_validate_json((files / CONFIG).read_text("utf-8"))

    def write(self, files: Path) -> None:
        """Put the card into the folder `files`."""
        files.mkdir(parents=True, exist_ok=True)
        (files / CONFIG).write_text(self.model_dump_json(indent=2) + "\n", "utf-8")


class RewardScale(BaseModel):
    """`reward.json`: mean and deviation of the raw scores of the SFT model's answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float

    @classmethod
    def read(cls, files: Path) -> "RewardScale":
        """The scale in the folder `files` of a reward model. Raises FileNotFoundError."""
        return cls.model_validate_json((files / REWARD).read_text("utf-8"))

    def write(self, files: Path) -> None:
        """Put the scale into the folder `files`."""
        (files / REWARD).write_text(self.model_dump_json(indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Policy(Artifact):
    """A language model: `model.safetensors` (fp32), `config.json`, `tokenizer/`."""

    kind: ClassVar[str] = "policy"

    @functools.cached_property
    def card(self) -> ModelCard:
        """Shape, vocabulary, role, tokenizer."""
        return ModelCard.read(self.files)


@dataclass(frozen=True)
class RewardModel(Artifact):
    """A scalar model that scores answers: as a policy, and `reward.json` for normalisation."""

    kind: ClassVar[str] = "reward_model"

    @functools.cached_property
    def card(self) -> ModelCard:
        """Shape, vocabulary, role, tokenizer."""
        return ModelCard.read(self.files)

    @property
    def scale(self) -> RewardScale:
        """Mean and deviation of its scores over SFT answers."""
        return RewardScale.read(self.files)


@dataclass(frozen=True)
class Export(Artifact):
    """A policy as a folder that other programs load, e.g. a Hugging Face Llama."""

    kind: ClassVar[str] = "export"

    @property
    def target(self) -> str:
        """Whose layout it has."""
        return str(json.loads((self.files / "export.json").read_text("utf-8"))["target"])
