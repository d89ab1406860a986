"""The four flows under one: what a signal does to the waiting for them."""

import signal
import time

import httpx
import pytest

from flows.part import current, show
from flows.pipeline import _start, _tell  # pyright: ignore[reportPrivateUsage]
from tests.flows.conftest import Place
from tests.flows.test_execution import start


class Slow:
    """A flow that goes on for a while."""

    name = "corpus"

    def __call__(self, *, return_state: bool) -> None:
        assert return_state
        time.sleep(0.5)


def test_a_part_that_goes_on_after_a_signal_does_not_count_as_ended(place: Place) -> None:
    current.set(start(place))
    started = time.monotonic()
    ended = _start(Slow())
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            ended.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not ended.is_set()
    assert ended.wait(20)
    assert time.monotonic() - started >= 0.5


def test_a_server_that_is_gone_is_not_asked_again_at_each_figure(place: Place) -> None:
    execution = start(place)
    token = current.set(execution)
    asked: list[int] = []

    def gone() -> None:
        asked.append(1)
        raise httpx.ConnectError("connection refused")

    def wrong() -> None:
        asked.append(1)
        raise ValueError("no such figure")

    try:
        for create in (wrong, wrong, gone, gone, wrong):
            assert show(create) is None
        assert len(asked) == 3
        execution.page_lost_until = 0.0
        assert show(lambda: "shown") == "shown"
    finally:
        current.reset(token)


def test_a_run_that_prefect_was_not_told_of_is_as_good_as_what_it_built(place: Place) -> None:
    said: list[str] = []

    def gone(*, return_state: bool) -> None:
        raise httpx.ConnectError("connection refused")

    execution = start(place)
    execution.start()
    _tell(said.append, gone)  # type: ignore[arg-type]
    execution.finish(0.1)
    assert said == ["Prefect was not told all of this run: ConnectError: connection refused"]
    assert execution.record.status == "failed"
    assert {stage.status for stage in execution.record.stages.values()} == {"failed"}
