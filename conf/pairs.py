"""Settings of the stage pairs."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from conf.launch import LaunchConfig
from conf.ppo import RewardJudgeConfig
from conf.settings import RUNTIME, Settings, SourceSpec


class PairsConfig(Settings):
    """Which preference pairs are read, and how the policy's own answers become rejected ones."""

    sources: tuple[SourceSpec, ...] = ()
    """Files of pairs: JSON or JSON lines (.gz, .zst), or Parquet, in any known layout."""
    held_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of what `held_by` names that is held out."""
    held_by: Literal["question", "pair"] = "question"
    """What a hash of decides which pairs of files are held out: the first user turn, as in chats, or the
    whole pair, where many pairs answer one question: else either all of them are held out or none."""
    on_bad_row: Literal["skip", "fail"] = "skip"
    """`skip` counts a row that cannot be read and goes on; `fail` ends the stage at the first."""
    keep_duplicates: bool = False
    """Whether a pair may stand in the files more than once."""
    several_answers: Literal["best_worst", "all_pairs"] = "best_worst"
    """Which pairs are made of several ranked or scored answers, of a file or of the policy."""
    margins: Literal["as_given", "scaled"] = "as_given"
    """`scaled` divides the margins of a file by the range of all scores in it, so that files with different
    scales agree: 1 is the whole range."""
    labelled: Literal["refuse", "keep"] = "refuse"
    """What becomes of rows with one answer that `label` calls good (true) or bad (false): `keep` takes them as
    pairs without the other answer, from which dpo learns with loss=kto and which all else leaves out."""
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Pairs whose answers share more than this of their character trigrams (Jaccard) are dropped; 1 keeps
    all that differ."""
    answers: Annotated[int, Field(ge=1)] = 1
    """Answers that the policy gives to each prompt."""
    rank_by: Literal["reference", "reward", "functions", "judge"] = "reference"
    """What makes pairs of them: `reference` takes each as the rejected one against the conversation's own
    answer; the others compare them among themselves, by the input `reward`, by `functions` or by `judge`."""
    functions: tuple[SourceSpec, ...] = ()
    """Python files with `score(answer) -> float`, as those of ppo; their sum ranks."""
    judge: RewardJudgeConfig | None = None
    """The judge that ranks."""
    prompts: Literal["all", "withheld"] = "all"
    """Which conversations are answered: all, or those of the questions that sft has not learnt."""
    withheld_share: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the questions that sft has withheld (its withheld_share), with prompts=withheld."""
    max_prompts: Annotated[int, Field(ge=0)] = 0
    """Conversations per side that are answered, chosen by the seed; 0 for all."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer of the policy in tokens; one that does not end by then is dropped."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature at which the policy answers."""
    batch_rows: Annotated[int, Field(ge=1)] = 64
    """Prompts answered at once. The noise of a prompt does not depend on its batch, but rounding
    may, so it counts as identity."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of prompts and of the sampling noise."""
    launch: Annotated[LaunchConfig, RUNTIME] = LaunchConfig()
    """Where and how the policy answers."""

    @model_validator(mode="after")
    def _ranking_is_possible(self) -> "PairsConfig":
        if self.rank_by != "reference" and self.answers < 2:
            raise ValueError(
                f"rank_by={self.rank_by} compares answers to a prompt with one another, answers="
                f"{self.answers}; set answers to 2 or more, or rank_by=reference"
            )
        for name in ("functions", "judge"):
            if (self.rank_by == name) != bool(getattr(self, name)):
                raise ValueError(
                    f"rank_by={self.rank_by} does not go with {name}={getattr(self, name)}; set both "
                    f"rank_by={name} and {name}, or neither"
                )
        return self

    def refuse_inputs(self, given: Collection[str]) -> None:
        """Raises ValueError for one of policy and conversations, neither of them and no files, and a reward
        model that does not rank or is missing."""
        if ("policy" in given) != ("conversations" in given):
            raise ValueError(
                "pairs has only one of the inputs policy and conversations, own answers need both; "
                "name both in `from`, or neither"
            )
        if "policy" not in given and not self.sources:
            raise ValueError(
                "pairs has nothing to read; set `sources` to files of pairs, or name the inputs policy "
                "and conversations in `from`"
            )
        if (self.rank_by == "reward") != ("reward" in given):
            raise ValueError(
                f"pairs has rank_by={self.rank_by} and {'an' if 'reward' in given else 'no'} input reward; name "
                "the input in `from` and set rank_by=reward, or neither"
            )
