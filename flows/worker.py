"""The worker behind the Prefect page: it starts every run that is asked for, as a process of its own.

It may end at any time, by kill -9 too, and the runs go on: each tells the server itself how it ends, and
heeds a cancel from the page itself once its worker is gone. The next worker finds those whose process is
gone as well and starts them again; they join a training job that still goes on, and take the rest from the
store. `python -m flows.worker` is the process; `bessemer up` starts it in the working directory, from which
relative paths of the recipes count.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner

from flows.deployments import deployments
from flows.runs import open_home
from flows.settle import take_up

POLL_SECONDS = 3.0
"""Time between two questions for what is to be started."""
_log = logging.getLogger("bessemer.worker")


class Worker(Runner):
    """A runner that leaves its runs alone when it ends; Prefect's would cancel them."""

    def handle_sigterm(self, *_: Any, **__: Any) -> None:
        """End at once, as after kill -9, for which all is prepared."""
        os._exit(0)

    async def __aexit__(self, *reason: Any) -> None:
        """The same where the server has been away for a minute, at which Prefect's runner gives up."""
        _log.error("the server does not answer, `bessemer up` starts both again: %r", reason[1])
        os._exit(1)


def main() -> None:
    """Register the deployments and serve them until the process is ended."""
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(_work(deployments()))


async def _work(offered: Iterable[RunnerDeployment]) -> None:
    # Prefect would pause all schedules when the worker ends, and leave them paused at the next `up`.
    worker = Worker(name="bessemer", pause_on_shutdown=False, query_seconds=POLL_SECONDS)
    served = [await worker.aadd_deployment(deployment) for deployment in offered]
    for name in take_up(open_home(), served):
        _log.info("%s: its process is gone; it goes on", name)
    await worker.start()


if __name__ == "__main__":
    main()
