"""When Python looks for garbage: hardly while a command starts, as usual once it works."""

import gc

OBJECTS_AT_START = 1_000_000
"""New objects after which it looks while a command starts."""
_USUAL = gc.get_threshold()


def put_off() -> None:
    """For a command's start, which makes a million objects that live to the end.

    To look through them again and again is a quarter of what a run without work costs.
    """
    gc.set_threshold(OBJECTS_AT_START)


def take_up() -> None:
    """For what goes on for long; what lives by now is no longer looked through.

    Every closed connection of asyncio is garbage that holds itself: a server that only starts to look
    after a million objects holds 140,000 of them, about 170 MiB.
    """
    if gc.get_threshold() == _USUAL:
        return
    gc.set_threshold(*_USUAL)
    gc.collect()
    gc.freeze()
    # How much must be new before it looks through all is a share of what the last look left: now little.
    gc.collect()
