"""A setting of dedup that could not act is refused, with the way out."""

import pytest
from pydantic import ValidationError

from conf.dedup import DedupConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "soft", "keep": "longest"}, "keep=longest would change nothing; leave keep"),
        ({"mode": "substring", "keep": "quality"}, "keep=quality would change nothing; leave keep"),
        ({"mode": "substring", "shingles": "words"}, "leave shingles at tokens"),
        ({"mode": "soft", "unit": "paragraph"}, "leave unit at document"),
        ({"keep": "source"}, "needs source_order"),
        ({"least_recall": 0.9, "bands": 10}, "one or the other"),
        ({"least_recall": 0.99, "threshold": 0.01}, "lower least_recall"),
    ],
)
def test_what_cannot_act_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DedupConfig.model_validate(given)


def test_every_mode_is_sound_by_itself() -> None:
    for mode in ("near", "simhash", "exact", "substring", "soft", "off"):
        assert DedupConfig.model_validate({"mode": mode}).mode == mode
