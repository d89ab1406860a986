"""A run that works looks for garbage again."""

import gc

import pytest

from flows.garbage import put_off
from tests.flows.conftest import Place
from tests.flows.test_execution import go


def test_a_run_of_hits_does_not_look_and_one_that_builds_does(
    place: Place, request: pytest.FixtureRequest
) -> None:
    usual = gc.get_threshold()
    request.addfinalizer(lambda: (gc.set_threshold(*usual), gc.unfreeze()))
    put_off()  # as `bessemer` begins
    go(place)
    assert gc.get_threshold() == usual
    put_off()
    go(place)
    assert gc.get_threshold() != usual
