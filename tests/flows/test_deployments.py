"""What `bessemer up` registers, and what `prefect deploy` registers for teams with a server of their own."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flows import load_flow_from_entrypoint

from flows.deployments import bessemer, choices, deployments, nodes
from flows.schedules import Schedule, slug_of


def test_the_file_of_the_prefect_cli_has_the_deployments_that_up_registers() -> None:
    written = yaml.safe_load((Path(__file__).parents[2] / "prefect.yaml").read_text("utf-8"))
    by_cli = {item["name"]: item for item in written["deployments"]}
    by_up = {item.name: item for item in deployments()}
    assert by_cli.keys() == by_up.keys()
    for name, item in by_cli.items():
        known = by_up[name]
        assert item["parameters"] == known.parameters
        assert item["description"] == known.description
        assert item["tags"] == known.tags
        assert load_flow_from_entrypoint(item["entrypoint"]).name == bessemer.name


def test_a_schedule_is_a_cron_expression_or_an_interval() -> None:
    every = Schedule("small", [], every_minutes=90).times()
    assert isinstance(every, IntervalSchedule)
    assert every.interval == timedelta(hours=1.5)
    for wrong in ({"cron": "noon"}, {"cron": "0 3 * * *", "timezone": "Middle/Earth"}):
        with pytest.raises(ValueError, match="cron has five fields"):
            Schedule("small", [], **wrong).times()
    for none_or_both in ({}, {"cron": "0 3 * * *", "every_minutes": 5.0}):
        with pytest.raises(ValueError, match="say when"):
            Schedule("small", [], **none_or_both).times()


def test_a_recipe_that_is_just_being_written_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "broken.yaml").write_text("stages: {a: [}\n")
    (tmp_path / "gbk.yaml").write_bytes("# 语料\nstages:\n".encode("gbk"))
    (tmp_path / "number.yaml").write_text("stages:\n  1: {uses: filter}\n  mine: {uses: filter}\n")
    (tmp_path / "other.yaml").write_text("jobs: {}\n")
    assert set(choices()) & {path.name for path in tmp_path.iterdir()} == {
        "broken.yaml",
        "gbk.yaml",
        "number.yaml",
    }
    assert {"mine", "pretrain"} <= set(nodes())
    assert 1 not in nodes()


def test_each_recipe_has_a_schedule_of_its_own() -> None:
    assert slug_of("recipes/My_corpus.yaml") == "my-corpus"
    names = [slug_of(name) for name in ("语料.yaml", "对齐.yaml", "语料 v2.yaml", "v2.yaml")]
    assert len(set(names)) == 4
    assert all(re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
