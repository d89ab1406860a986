"""What a server of a model and the process that computes its answers tell each other.

One JSON value a line on the pipes of the process: Asked goes in, lists of Told come out, a list for
each step. They never import each other; they meet in the forms given here.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

End = Literal["", "stop", "length"]
"""Why an answer ended: a stop token, or as many tokens as it may have; empty while it goes on."""


class Ask(BaseModel):
    """One answer that is wanted. `key` names it; `seed` and `row` are all that its noise depends on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: int
    prompt: Annotated[tuple[int, ...], Field(min_length=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    stops: frozenset[int]
    """Tokens behind which the answer ends."""
    temperature: Annotated[float, Field(ge=0)]
    """0 takes the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Only so many of the likeliest tokens; 0 for all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Only the likeliest tokens that together have this share of what top_k leaves."""
    seed: Annotated[int, Field(ge=0)] = 0
    row: Annotated[int, Field(ge=0)] = 0
    logprobs: Annotated[int, Field(ge=0)] | None = None
    """Tokens whose log-probability, at temperature 1, is told beside the chosen one's; None to tell
    none."""

    @property
    def places(self) -> int:
        """Tokens that prompt and answer have at most."""
        return len(self.prompt) + self.max_new_tokens


class Asked(BaseModel):
    """A line to the process: an answer that is wanted, or one that is no longer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ask: Ask | None = None
    drop: int | None = None


class Told(NamedTuple):
    """One token of an answer."""

    key: int
    token: int
    end: End
    """The answer's last token says why, and is the stop token where it is `stop`."""
    logprob: float | None = None
    top: list[tuple[int, float]] | None = None
    """The likeliest tokens, likeliest first, with their log-probabilities."""


class Serving(BaseModel):
    """How a process computes answers; its one argument, as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str
    """The `files` of a policy, or a Hugging Face folder."""
    rows: Annotated[int, Field(ge=1)] = 32
    """Answers computed at a time."""
    cache_tokens: Annotated[int, Field(ge=1)] = 65_536
    """Most tokens whose keys and values are held: rows times the longest of them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights and of the arithmetic."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of the arithmetic on the CPU."""


class Ready(BaseModel):
    """The first line from the process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    context: int
    parameters: int
