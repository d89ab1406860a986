"""What the READMEs say to type is what the command line takes; both languages say the same."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from conf.fanout import FanoutConfig
from conf.launch import LaunchConfig
from flows.cli import app
from flows.graph import check_selection, load_graph
from tasks.stage import stages

ROOT = Path(__file__).parents[2]
READMES = ("README.md", "README.zh.md")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(name: str, language: str = "") -> list[str]:
    text = (ROOT / name).read_text("utf-8")
    return [body for tag, body in FENCE.findall(text) if tag == language]


def commands(name: str) -> list[list[str]]:
    """Every `bessemer ...`, on a line of its own or within a sentence, as words."""
    text = (ROOT / name).read_text("utf-8")
    lines = [line for body in blocks(name) for line in body.splitlines()]
    lines += re.findall(r"`(bessemer [^`\n]+)`", text)
    found = [line for line in lines if line.startswith("bessemer ")]
    assert len(found) > 12
    return [shlex.split(line, comments=True)[1:] for line in dict.fromkeys(found)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with one file of each kind that a recipe insists on."""
    for name in ("crawl/a.warc.gz", "books/a.parquet", "sft/a/a.jsonl", "preference/a/a.jsonl"):
        (tmp_path / "DIR" / name).parent.mkdir(parents=True)
        (tmp_path / "DIR" / name).touch()
    return tmp_path


@pytest.mark.parametrize("name", READMES)
def test_every_command_parses_and_every_recipe_is_sound(name: str, folder: Path) -> None:
    group = typer.main.get_command(app)
    known: dict[str, typer.core.TyperCommand] = group.commands  # type: ignore[attr-defined]
    for command, *arguments in commands(name):
        context = known[command].make_context(command, list(arguments))  # raises a usage error
        if command in ("plan", "run") and not context.params.get("is_budget"):
            given = context.params
            graph = load_graph(given["recipe"], list(given["overrides"] or ()), base=folder)
            chosen = [given[key] for key in ("start", "until", "only") if given[key]]
            check_selection(graph, {"from": chosen, "force": given["force"] or ()})


@pytest.mark.parametrize("name", READMES)
def test_the_recipe_is_sound(name: str, folder: Path) -> None:
    (recipe,) = blocks(name, "yaml")
    (folder / "mine.yaml").write_text(recipe, "utf-8")
    graph = load_graph(str(folder / "mine.yaml"), [f"data={folder / 'DIR'}"], base=folder)
    assert graph.nodes["dpo_soft"].spec.name == "dpo"


@pytest.mark.parametrize("name", READMES)
def test_every_setting_that_is_named_is_one(name: str) -> None:
    owners = {stage: spec.settings for stage, spec in stages().items()}
    owners |= {"launch": LaunchConfig, "fanout": FanoutConfig}
    spans = re.findall(r"`([^`\n]+)`", (ROOT / name).read_text("utf-8"))
    named = [found for span in spans for found in re.findall(r"\b(\w+)\.(\w+)\b", span)]
    settings = [(owner, setting) for owner, setting in named if owner in owners]
    assert len(settings) > 40
    assert [pair for pair in settings if pair[1] not in owners[pair[0]].model_fields] == []


@pytest.mark.parametrize("name", READMES)
def test_make_knows_every_target_that_is_named(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    named = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    rules = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {"run", "test"} <= named <= rules


def test_both_languages_name_the_same_commands_and_figures() -> None:
    english, chinese = ((ROOT / name).read_text("utf-8") for name in READMES)
    assert commands(READMES[0]) == commands(READMES[1])
    figures = re.compile(r"\d\.\d{3}")
    assert figures.findall(english) == figures.findall(chinese)
    assert english.count("\n## ") == chinese.count("\n## ")
