"""The graph of a plan, drawn as a page."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.preparation import Request, prepare
from flows.runs import open_home
from tests.flows.conftest import Place


def test_the_plan_is_drawn_with_what_the_store_has(place: Place) -> None:
    execution = prepare(Request(str(place.recipe)), open_home(), base=place.folder)
    execution.start()
    while (name := execution.next_ready(execution.selected)) is not None:
        execution.run(name)
    execution.finish(0.0)
    place.ran()

    target = place.folder / "图.html"
    arguments = ["plan", str(place.recipe), "fine.heat=0.5", "--graph", str(target)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    page = target.read_text("utf-8")
    assert place.ran() == []
    # `fine` is changed and `blend` reads it; the other three are there.
    assert "5 stages, 3 in the store, 2 to be built" in page
    drawn = page[page.index("<svg") : page.index("</svg>")]
    assert drawn.count(">in the store<") == 3
    assert drawn.count(">to be built<") == 2
    for name in ("mine", "coarse", "fine", "other", "blend"):
        assert f">{name}<" in drawn


def test_a_page_without_its_folder_is_refused(place: Place) -> None:
    target = Path("nowhere") / "graph.html"
    with pytest.raises(ValueError, match="make it, or name another file"):
        CliRunner().invoke(
            app, ["plan", str(place.recipe), "--graph", str(target)], catch_exceptions=False
        )
