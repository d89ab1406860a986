"""A home, a folder to work in, and the tiny stages instead of the real ones."""

from pathlib import Path

import pytest

from tasks import stage as registry
from tests.flows.tiny_stages import LOG, tiny_stages

RECIPE = """
seed: 0
stages:
  mine: {sources: [{path: "raw/*.txt"}]}
  coarse: {uses: smelt, from: {ore: mine}}
  fine: {uses: smelt, from: {ore: coarse}, heat: 1.0}
  other: {uses: smelt, from: {ore: mine}, heat: 1.0}
  blend: {from: {ores: {a: fine, b: other}}}
"""


class Place:
    """A working folder with raw files and a recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "tiny.yaml"
        self.log = folder / "log.txt"
        (folder / "raw").mkdir()
        for name in ("one", "two"):
            text = "".join(f"{name} {line} 钢\n" for line in range(4))
            (folder / "raw" / f"{name}.txt").write_text(text, "utf-8")
        self.recipe.write_text(RECIPE, "utf-8")

    def ran(self) -> list[str]:
        """Nodes that really ran since the last look, sorted."""
        lines = self.log.read_text("utf-8").split() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return sorted(lines)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(registry, "stages", tiny_stages)
    monkeypatch.setenv("BESSEMER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BESSEMER_WORKERS", "1")
    monkeypatch.chdir(tmp_path)
    found = Place(tmp_path)
    monkeypatch.setenv(LOG, str(found.log))
    return found
