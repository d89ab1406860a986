"""Models as artifacts: a policy, a reward model, and a policy exported for other programs."""

import base64
import functools
import json
import zlib
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
READ = "read.json"
LOOKS = "looks"


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


class ReadWindows(BaseModel):
    """`read.json` of a pretrained policy: which windows of the token files training has read.

    Window w of a domain is its tokens w x `row_tokens` to (w + 1) x `row_tokens` - 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row_tokens: int
    domains: dict[str, str]
    """Base64 of the deflated bits of each domain, the lowest bit of the first byte for window 0."""

    @staticmethod
    def pack(bits: bytes) -> str:
        """A value of `domains`."""
        return base64.b64encode(zlib.compress(bits)).decode("ascii")

    def bits(self, domain: str) -> bytes:
        """The bits of a domain; empty for one that was not trained on."""
        packed = self.domains.get(domain)
        return zlib.decompress(base64.b64decode(packed)) if packed else b""

    @classmethod
    def read(cls, files: Path) -> "ReadWindows | None":
        """The list in the folder `files` of a policy; none where the policy has no list."""
        path = files / READ
        return cls.model_validate_json(path.read_text("utf-8")) if path.is_file() else None

    def write(self, files: Path) -> None:
        """Put the list into the folder `files`."""
        (files / READ).write_text(self.model_dump_json(indent=2) + "\n", "utf-8")


@dataclass(frozen=True)
class Policy(Artifact):
    """A language model: `model.safetensors` (fp32), `config.json`, `tokenizer/`, `read.json` where
    it was pretrained, and `looks/` where weights were kept on the way."""

    kind: ClassVar[str] = "policy"

    @functools.cached_property
    def card(self) -> ModelCard:
        """Shape, vocabulary, role, tokenizer."""
        return ModelCard.read(self.files)


def look_path(files: Path, step: int) -> Path:
    """File of the weights after so many steps of pretraining."""
    return files / LOOKS / f"step_{step:09d}.safetensors"


def kept_looks(files: Path) -> dict[int, Path]:
    """Step -> file of the weights that pretraining kept on its way, in order."""
    found = sorted((files / LOOKS).glob("step_*.safetensors"))
    return {int(path.stem.removeprefix("step_")): path for path in found}


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
