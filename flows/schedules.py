"""When recipes run by themselves: schedules of the deployments, as the Prefect page shows and edits them.

A run by schedule is one like any other: with nothing new it takes everything from the store.
"""

import hashlib
import re
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from flows.preparation import PARTS
from flows.runs import ServiceError

FLOW = "bessemer"
REGISTER_SECONDS = 120.0
"""A worker that has not registered its deployments by then never will."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Schedule:
    """A recipe, what of it is run, and when: by cron or at an interval."""

    recipe: str
    overrides: list[str]
    part: str = "full"
    is_extension: bool = False
    cron: str | None = None
    every_minutes: float | None = None
    timezone: str = "UTC"

    @property
    def slug(self) -> str:
        """Name of the schedule; a deployment has one for each recipe."""
        return slug_of(self.recipe)

    def times(self) -> CronSchedule | IntervalSchedule:
        """When it runs. Raises ValueError for what is no time."""
        if (self.cron is None) == (self.every_minutes is None):
            raise ValueError(
                "say when: --cron EXPRESSION or --every-minutes NUMBER, one of the two"
            )
        if self.every_minutes is not None:
            return IntervalSchedule(interval=timedelta(minutes=self.every_minutes))
        try:
            return CronSchedule(cron=str(self.cron), timezone=self.timezone)
        except ValidationError as error:
            raise ValueError(
                f"--cron {self.cron!r} --timezone {self.timezone}: {error.errors()[0]['msg']}; cron has "
                "five fields (minute hour day month weekday), a time zone is named as Asia/Shanghai"
            ) from error


def slug_of(recipe: str) -> str:
    """Name of a recipe's schedule, in the few letters that Prefect takes."""
    stem = Path(recipe).stem.lower()
    # Without it all Chinese names would be one.
    mark = "" if stem.isascii() else f"-{hashlib.sha256(stem.encode()).hexdigest()[:8]}"
    return (re.sub(r"[^a-z0-9]+", "-", stem).strip("-") + mark).strip("-")


def put_schedule(wanted: Schedule) -> None:
    """Have a recipe run at its times, instead of any that it had. Raises ServiceError as `_deployment`."""
    times = wanted.times()
    parameters = {
        "recipe": wanted.recipe,
        "overrides": wanted.overrides,
        "is_extension": wanted.is_extension,
    }
    with _deployment(wanted.part) as (client, deployment):
        _remove(client, deployment, wanted.slug)
        made = DeploymentScheduleCreate(schedule=times, parameters=parameters, slug=wanted.slug)
        client.create_deployment_schedules(deployment.id, [made])


def end_schedule(recipe: str, part: str) -> None:
    """Remove a recipe's schedule. Raises ValueError where it has none."""
    with _deployment(part) as (client, deployment):
        if not _remove(client, deployment, slug_of(recipe)):
            raise ValueError(f"{recipe} has no schedule in {part}; `bessemer deploy` lists all")


def schedules() -> list[str]:
    """Every schedule in words."""
    found: list[str] = []
    for part in ("full", *PARTS):
        with _deployment(part) as (client, deployment):
            for schedule in client.read_deployment_schedules(deployment.id):
                times: Any = schedule.schedule
                when = getattr(times, "cron", None) or f"every {getattr(times, 'interval', '')}"
                words = " ".join(
                    [
                        schedule.parameters.get("recipe", "demo"),
                        *schedule.parameters.get("overrides", []),
                    ]
                )
                how = " --extend" if schedule.parameters.get("is_extension") else ""
                state = "" if schedule.active else " (off)"
                found.append(f"{part}: {words}{how}, {when} {times.timezone or 'UTC'}{state}")
    return found


def _remove(client: SyncPrefectClient, deployment: DeploymentResponse, slug: str) -> int:
    known = client.read_deployment_schedules(deployment.id)
    old = [schedule for schedule in known if schedule.slug == slug]
    for schedule in old:
        client.delete_deployment_schedule(deployment.id, schedule.id)
    return len(old)


@contextmanager
def _deployment(part: str) -> Generator[tuple[SyncPrefectClient, DeploymentResponse]]:
    """A deployment, once the worker has registered it. Raises ServiceError where it does not."""
    deadline = time.monotonic() + REGISTER_SECONDS
    with get_client(sync_client=True) as client:
        while True:
            try:
                deployment = client.read_deployment_by_name(f"{FLOW}/{part}")
                break
            except ObjectNotFound as error:
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"the worker did not register {FLOW}/{part}; see services/worker.log in the home"
                    ) from error
                time.sleep(POLL_SECONDS)
        yield client, deployment
