"""Recipes as people write them become one mapping; what cannot be understood is named."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conf.compose import choices_of, compose, recipes
from conf.mistakes import RecipeError

BASE = """
seed: 3
stages:
  filter: {from: {corpus: extract}, minimum: 5}
  dedup: {from: {corpus: filter, other: extract}, threshold: 0.8, words: {en: 1, zh: 2}}
  ppo: {from: {policy: sft}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE, "utf-8")
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


def mistakes(recipe: str | Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        compose(recipe, list(overrides))
    return str(caught.value)


def test_a_recipe_without_defaults_stands_alone(folder: Path) -> None:
    mapping = compose(folder / "base.yaml", [])
    assert mapping["seed"] == 3
    assert list(mapping["stages"]) == ["filter", "dedup", "ppo"]


def test_settings_merge_and_from_replaces(folder: Path) -> None:
    text = """
    defaults: [base, _self_]
    stages:
      dedup: {from: {corpus: extract}, threshold: 0.7, words: {zh: 3}}
    """
    dedup = compose(write(folder, text), [])["stages"]["dedup"]
    assert dedup == {"from": {"corpus": "extract"}, "threshold": 0.7, "words": {"en": 1, "zh": 3}}


def test_null_removes_a_node_in_the_recipe_and_on_the_command_line(folder: Path) -> None:
    recipe = write(folder, "defaults: [base, _self_]\nstages: {ppo: null}")
    assert list(compose(recipe, ["filter=null"])["stages"]) == ["dedup"]
    assert list(compose(recipe, ["~filter"])["stages"]) == ["dedup"]


def test_self_decides_who_overrides_whom(folder: Path) -> None:
    first = write(folder, "defaults: [_self_, base]\nseed: 9")
    assert compose(first, [])["seed"] == 3
    last = write(folder, "defaults: [base, _self_]\nseed: 9")
    assert compose(last, [])["seed"] == 9
    unsaid = write(folder, "defaults: [base]\nseed: 9")
    assert compose(unsaid, [])["seed"] == 9


@pytest.mark.parametrize("text", ["defaults: [base, {launch: ddp}, _self_]", "launch: ddp"])
def test_a_group_is_chosen_in_defaults_or_by_its_key(folder: Path, text: str) -> None:
    launch = compose(write(folder, text), ["launch.processes=4"])["launch"]
    assert launch == {"launcher": "torchrun", "engine": "ddp", "processes": 4}


def test_the_outer_recipe_and_then_the_command_line_choose_the_group(folder: Path) -> None:
    write(folder, "defaults: [{launch: zero2}, _self_]", "inner.yaml")
    recipe = write(folder, "defaults: [inner, {launch: ddp}, _self_]")
    assert compose(recipe, [])["launch"]["engine"] == "ddp"
    assert compose(recipe, ["launch=local"])["launch"]["engine"] == "plain"


@pytest.mark.parametrize("place", ["/data/store", "s3://bucket/store"])
def test_the_store_is_named_by_its_place_or_by_a_file(folder: Path, place: str) -> None:
    recipe = write(folder, "store: /elsewhere")
    assert compose(recipe, [])["store"] == {"url": "/elsewhere"}
    assert compose(recipe, [f"store={place}"])["store"] == {"url": place}
    assert compose(write(folder, "seed: 1"), [f"store={place}"])["store"] == {"url": place}
    assert compose(write(folder, "seed: 1"), ["store=s3"])["store"]["url"].startswith("s3://")


def test_data_is_filled_in_and_asked_for_when_missing(folder: Path) -> None:
    recipe = write(folder, 'stages: {extract: {sources: [{path: "${data}/raw/*.txt"}]}}')
    mapping = compose(recipe, ["data=/d 1".replace(" ", "")])
    assert mapping["stages"]["extract"]["sources"] == [{"path": "/d1/raw/*.txt"}]
    assert "data=DIR" in mistakes(recipe)


def test_command_line_reaches_settings_inputs_lists_and_nested_values(folder: Path) -> None:
    overrides = [
        "dedup.threshold=0.5",
        "stages.dedup.words.en=7",
        "dedup.names=[a,b]",
        "filter.from.corpus=crawl",
        "ppo.from={policy: dpo, reward: reward}",
        "seed=11",
    ]
    stages = compose(folder / "base.yaml", overrides)["stages"]
    assert stages["dedup"]["threshold"] == 0.5
    assert stages["dedup"]["words"] == {"en": 7, "zh": 2}
    assert stages["dedup"]["names"] == ["a", "b"]
    assert stages["filter"]["from"] == {"corpus": "crawl"}
    assert stages["ppo"]["from"] == {"policy": "dpo", "reward": "reward"}


def test_floats_in_scientific_notation_are_numbers(folder: Path) -> None:
    recipe = write(folder, "stages: {sft: {rate: 3e-4}}")
    assert compose(recipe, [])["stages"]["sft"]["rate"] == 0.0003


def test_every_mistake_of_the_command_line_is_told_at_once(folder: Path) -> None:
    told = mistakes(
        folder / "base.yaml", "dedpu.threshold=1", "a b", "seed=1,2", "launch=dpp", "shape=huge"
    )
    assert "no node is called 'dedpu'; did you mean 'dedup'?" in told
    assert "a b: is no override" in told
    assert "seed=1,2: is a sweep" in told
    assert "there is no launch 'dpp'; did you mean 'ddp'?" in told
    assert "there is no shape 'huge'" in told


def test_unknown_and_reserved_names_are_told_with_the_mend(folder: Path) -> None:
    told = mistakes(write(folder, "stage: {a: {}}\nstages: {seed: {}, 'no name': {}}"))
    assert "stage: unknown key of a recipe; did you mean 'stages'?" in told
    assert "stages.seed: is a reserved name" in told
    assert "stages.no name: is no name for a node" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages: [", "not readable as YAML"),
        ("- a", "is not a mapping"),
        ("stages: [a]", "is no mapping"),
        ("stages: {dedup: 3}", "3 is no node"),
        ("defaults: standard", "is not a list"),
        ("defaults: [7]", "7 is no default"),
        ("defaults: [{sahpe: tiny}]", "did you mean 'shape'?"),
        ("defaults: [{launch: dpp}]", "did you mean 'ddp'?"),
        ("defaults: [standrad]", "did you mean 'standard'?"),
        ("defaults: [mine]", "name one another"),
        ("stages: {a: {b: '${nowhere}'}}", "cannot be composed"),
    ],
)
def test_broken_recipes_say_what_is_broken(folder: Path, text: str, expected: str) -> None:
    assert expected in mistakes(write(folder, text))


def test_recipes_that_come_with_us_are_listed_and_an_unknown_one_is_guessed() -> None:
    assert {"standard", "demo"} <= set(recipes())
    assert {"local", "ddp", "zero2"} <= set(choices_of("launch"))
    assert "did you mean 'demo'?" in mistakes("dmeo")


def test_composing_in_many_threads_gives_each_its_own(folder: Path) -> None:
    def one(index: int) -> int:
        return compose(folder / "base.yaml", [f"dedup.threshold={index}"])["stages"]["dedup"][
            "threshold"
        ]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(24))) == list(range(24))
