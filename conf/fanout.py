"""Who builds the shards of the data stages."""

from typing import Literal

from pydantic import model_validator

from conf.settings import Settings


class FanoutConfig(Settings):
    """Which processes build the shards of the data stages; the bytes are the same from all of them."""

    kind: Literal["local", "dask", "ray"] = "local"
    """`local` starts processes of this machine; `dask` and `ray` use a cluster that is up, whose
    workers have Bessemer installed and see the store: a folder that all of them share, or S3."""
    address: str | None = None
    """The cluster's: `tcp://host:8786` of Dask's scheduler, `host:6379` of Ray's head; none: what
    `$DASK_SCHEDULER_ADDRESS` or `$RAY_ADDRESS` says."""

    @model_validator(mode="after")
    def _is_of_a_cluster(self) -> "FanoutConfig":
        if self.kind == "local" and self.address:
            raise ValueError(f"{self.address} is of no use to local; say fanout=dask or fanout=ray")
        return self


LOCAL = FanoutConfig()
"""Processes of this machine."""
