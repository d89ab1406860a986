"""New data starts a run: the service that looks at the watched places.

What a place holds is compared, by content, with what the runs of its recipe have read; runs that
go on count, so a run by a schedule that has seen a file already leaves nothing to do here. Files that no
run has read start one run of the deployment `full`. The request for it is named by the recipe and these
contents: the server makes one run of however many equal requests, also over restarts of the watcher.

`python -m flows.watch` is the service; `bessemer up` starts it where something is to be watched.
"""

import hashlib
import json
import logging
import os
import sqlite3
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from flows.arrivals import Arrivals, open_place
from flows.runs import Home
from flows.watches import Watch, watches
from storage.errors import BessemerError
from storage.source import HashCache

DEPLOYMENT = "bessemer/full"
LOOK_SECONDS = 5.0
MOST_NAMES = 5
TAG = "watch"
_log = logging.getLogger("bessemer.watch")


@dataclass
class Watcher:
    """One watch, turn by turn."""

    watch: Watch
    home: Home
    arrivals: Arrivals
    _asked: str = ""
    """Name of the last request that the server has taken."""
    _flow_run: UUID | None = None
    """The run that it started."""
    trouble: str = ""
    """What keeps it from looking, told once while it lasts."""
    _known: set[str] = field(default_factory=set[str])
    """Contents that complete runs have read."""
    _ended: set[str] = field(default_factory=set[str])
    """Ids of the runs that need not be looked at again."""

    @classmethod
    def of(cls, watch: Watch, home: Home) -> "Watcher":
        """A watcher of a home's watch."""
        place = open_place(watch.place, HashCache(home.path / "hashes.sqlite"), home.path)
        return cls(watch, home, Arrivals(place, watch.wholeness, watch.settle_seconds))

    def turn(self) -> list[str]:
        """Look once; names of the files for which a run was started."""
        found = self.arrivals.look()
        read = self._contents_read()
        new = {name: digest for name, digest in found.items() if digest not in read}
        request = self._request(new)
        if not new or request == self._asked or self._is_being_run():
            return []
        self._start(request)
        self._asked = request
        return sorted(new)

    def _contents_read(self) -> set[str]:
        """Contents that runs of the recipe have read, or are about to.

        Of a run that died, or failed, nothing counts: what it read is new again.
        """
        live: set[str] = set()
        for record in self.home.records(without=self._ended):
            sources = [source for s in record.stages.values() for source in s.sources.values()]
            files = [file for source in sources for landing in source for file in landing]
            contents = {str(file[0]) for file in files}
            is_ours = record.recipe == Path(self.watch.recipe).stem
            if record.state == "running":
                live |= contents if is_ours else set()
                continue
            self._ended.add(record.run_id)
            self._known |= contents if is_ours and record.status == "done" else set()
        return self._known | live

    def _request(self, new: dict[str, str]) -> str:
        asked = self.watch.model_dump(include={"recipe", "overrides", "is_extension"})
        asked["contents"] = sorted(set(new.values()))
        return f"watch-{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()}"

    def _is_being_run(self) -> bool:
        """Whether a run goes on that may read what is new, or after which it is looked again."""
        name = Path(self.watch.recipe).stem
        if any(r.recipe == name and r.state == "running" for r in self.home.live_runs()):
            return True
        if self._flow_run is None:
            return False
        from prefect.client.orchestration import get_client
        from prefect.exceptions import ObjectNotFound

        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(self._flow_run).state
        except ObjectNotFound:
            return False  # somebody has deleted it
        return state is not None and not state.is_final()

    def _start(self, request: str) -> None:
        from prefect.client.orchestration import get_client

        parameters = {
            "recipe": self.watch.recipe,
            "overrides": self.watch.overrides,
            "is_extension": self.watch.is_extension,
        }
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
            run = client.create_flow_run_from_deployment(
                deployment.id, parameters=parameters, tags=[TAG], idempotency_key=request
            )
        self._flow_run = run.id


def main() -> None:
    """Look at all places of the home until the process is ended."""
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    home = Home(Path(os.environ["BESSEMER_HOME"]))
    watchers: dict[str, Watcher] = {}
    while True:
        wanted = {watch.model_dump_json(): watch for watch in watches(home)}
        watchers = {
            key: watchers.get(key) or Watcher.of(watch, home) for key, watch in wanted.items()
        }
        for watcher in watchers.values():
            look_once(watcher)
        time.sleep(LOOK_SECONDS)


def look_once(watcher: Watcher) -> None:
    """A turn, of which only the log tells."""
    import httpx
    from prefect.exceptions import PrefectException

    place = watcher.watch.place
    try:
        started = watcher.turn()
    except (OSError, BessemerError, PrefectException, httpx.HTTPError, sqlite3.Error) as error:
        # The server, the bucket or a folder on the network is away, or a disk full: it is looked again.
        trouble = f"{type(error).__name__}: {str(error)[:500]}"
        if trouble != watcher.trouble:
            _log.warning("%s: %s", place, trouble)
        watcher.trouble = trouble
        return
    watcher.trouble = ""
    if started:
        names = ", ".join(started[:MOST_NAMES]) + (" .." if len(started) > MOST_NAMES else "")
        _log.info("%s: a run was started for %d new files: %s", place, len(started), names)


if __name__ == "__main__":
    main()
