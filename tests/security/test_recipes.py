"""A recipe that somebody else wrote runs no code, reads nothing of ours and ends in bounded time."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import compose
from conf.mistakes import RecipeError
from flows.graph import load_graph

ROOT = Path(__file__).resolve().parents[2]


def refusal(folder: Path, recipe: str, *overrides: str) -> str:
    (folder / "recipe.yaml").write_text(recipe, "utf-8")
    with pytest.raises(RecipeError) as caught:
        compose(folder / "recipe.yaml", list(overrides))
    return str(caught.value)


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/name:os.mkdir", "binary"])
def test_a_yaml_tag_makes_no_object(tmp_path: Path, tag: str) -> None:
    place = tmp_path / "ran"
    refusal(tmp_path, f"stages: {{a: !!{tag} ['{place}']}}")
    assert not place.exists()


def test_a_target_of_hydra_is_an_unknown_setting(tmp_path: Path) -> None:
    place = tmp_path / "ran"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stages: {{world: {{_target_: os.mkdir, path: '{place}'}}}}", "utf-8")
    with pytest.raises(RecipeError, match="_target_"):
        load_graph(str(recipe), [], base=tmp_path)
    assert not place.exists()


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:PLANTED}",
        "${oc.decode:${oc.env:PLANTED}}",
        "${oc.env:PLANTED,'}'}",
        "a/${data}/${now:%Y}",
        "${oc.${seed}:PLANTED}",
        r"\\${oc.env:PLANTED}",
        r"\${oc.env:PLANTED}",
        "${oc.dict.keys:{a: 1}}",
    ],
)
@pytest.mark.parametrize("is_override", [False, True])
def test_nothing_is_read_but_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, is_override: bool
) -> None:
    monkeypatch.setenv("PLANTED", "hunter2")
    if is_override:
        told = refusal(tmp_path, "seed: 1\nstages: {}", f"data='{value}'")
    else:
        told = refusal(tmp_path, f'seed: env\ndata: "{value.replace(chr(92), chr(92) * 2)}"')
    assert "hunter2" not in told


def test_references_to_other_values_are_followed(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: here\nstages: {extract: {a: '${data}/x', b: [1, '${..a}', '${stages.extract.a}']}}"
    )
    node = compose(recipe, [])["stages"]["extract"]
    assert node == {"a": "here/x", "b": [1, "here/x", "here/x"]}


LAUGHS = "data: &a0 [ha, ha]\n" + "".join(
    f"k{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
CHAIN = "stages:\n" + "".join(
    f"  n{i}: {{a: '${{stages.n{i + 1}.a}}${{stages.n{i + 1}.a}}'}}\n" for i in range(40)
)
BOMBS = {
    "aliases": LAUGHS,
    "references": CHAIN + "  n40: {a: ha}\n",
    "circle": "stages: {a: {b: '${stages.a.c}', c: '${stages.a.b}'}}",
    "itself": "stages: &a {b: *a}",
    "lists": "stages: " + "[" * 100_000,
    "maps": "stages: " + "{a: " * 100_000,
    "size": "#" + "ha" * (1 << 20),
}
READ = """
import sys
from pathlib import Path
from conf.compose import compose
from conf.mistakes import RecipeError
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        compose(path, [])
        sys.exit(f"{path.name} was taken")
    except RecipeError:
        print(path.stem)
try:
    compose("demo", ["world.good_pages=" + "[" * 2000 + "]" * 2000])
    sys.exit("an override was taken")
except RecipeError:
    print("override")
"""


def test_bombs_are_refused_within_a_gigabyte_and_seconds(tmp_path: Path) -> None:
    for name, text in BOMBS.items():
        (tmp_path / f"{name}.yaml").write_text(text, "utf-8")

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    ended = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)],
        cwd=ROOT,
        preexec_fn=bound,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout.split() == [*sorted(BOMBS), "override"], ended.stderr
