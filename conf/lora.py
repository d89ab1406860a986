"""Settings of low-rank adaptation."""

from typing import Annotated

from pydantic import Field

from conf.launch import LaunchConfig
from conf.settings import Settings


class LoraConfig(Settings):
    """Whether a small correction of each matrix is learnt in place of the matrix itself."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the corrections; 0 trains all weights (Hu et al. 2022, table 6: 4 to 64)."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The correction counts alpha / rank times; corrections want about ten times the learning rate."""

    def refuse_engine(self, launch: LaunchConfig) -> None:
        """Raises ValueError for an engine that cuts matrices into pieces."""
        if self.rank and launch.tensor_parallel > 1:
            raise ValueError(
                f"lora.rank={self.rank} does not run with launch.tensor_parallel={launch.tensor_parallel}; "
                f"use launch.tensor_parallel=1, or lora.rank=0"
            )
