"""What pretraining settings come to, and which are refused."""

import math
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from conf.pretrain import PhaseConfig, PretrainConfig
from conf.shape import ShapeConfig

SHAPES = Path(__file__).resolve().parents[2] / "conf" / "shape"


def shape(name: str) -> ShapeConfig:
    return ShapeConfig.model_validate(yaml.safe_load((SHAPES / f"{name}.yaml").read_text()))


@pytest.mark.parametrize(
    ("name", "vocabulary", "millions"),
    [("92m", 64_793, 91.64), ("218m", 64_793, 218.13), ("160m", 32_006, 159.39)],
)
def test_named_shapes_count_the_matrices_of_the_systems_they_come_from(
    name: str, vocabulary: int, millions: float
) -> None:
    found = shape(name)
    norms = (2 * found.layers + 1) * found.dim
    assert round((found.parameters(vocabulary) - norms) / 1e6, 2) == millions


def test_every_named_shape_is_valid() -> None:
    assert {path.stem for path in SHAPES.glob("*.yaml")} >= {
        "tiny", "20m", "92m", "160m", "218m", "1b",
    }  # fmt: skip
    for path in SHAPES.glob("*.yaml"):
        shape(path.stem)


def settings(**fields: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {"shape": ShapeConfig(context=64), "batch_tokens": 640} | fields
    )


def test_epochs_come_to_whole_steps_over_all_windows() -> None:
    # ceil(1000 / 64) + ceil(300 / 64) = 16 + 5 = 21 rows; 2 epochs of them at 10 rows a step.
    plan = settings(epochs=2).plan({"web": 1000, "books": 300})
    assert plan.steps == math.ceil(42 / 10) == 5
    assert plan.phases == ((5, (300.0, 1000.0)),)


def test_tokens_come_before_epochs() -> None:
    assert settings(tokens=6400, epochs=9).plan({"web": 1000}).steps == 10


def test_phases_split_the_steps_and_name_their_domains() -> None:
    phases = (PhaseConfig(tokens=0.75), PhaseConfig(tokens=0.25, mix={"books": 1.0}))
    plan = settings(tokens=64_000, phases=phases).plan({"web": 9000, "books": 1000})
    assert plan.phases == ((75, (1000.0, 9000.0)), (25, (1.0, 0.0)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context": 128}, "context=128 is longer than the model's shape.context=64"),
        (
            {"batch_tokens": 100},
            "batch_tokens=100 is not a multiple of the row of 64 tokens; use 128",
        ),
        ({"phases": [{"tokens": 0.5}]}, "add up to 0.5; make it 1"),
        ({"learning_rate": 0}, "greater than 0"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        settings(**fields)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"boks": 1.0}, "the mix names domain 'boks', .* the data has web"),
        ({"books": 1.0}, "the mix names domain 'books', of which there are no training tokens"),
        ({"web": 0.0}, "gives every domain the share 0"),
    ],
)
def test_a_mix_that_the_data_cannot_give_is_refused(mix: dict[str, float], words: str) -> None:
    phases = (PhaseConfig(tokens=1, mix=mix),)
    with pytest.raises(ValueError, match=words):
        settings(phases=phases).plan({"web": 1000, "books": 0})


def test_data_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no domain has the 64 training tokens of one row"):
        settings().plan({"web": 63, "books": 0})


def test_where_it_runs_is_no_identity() -> None:
    plain = settings().identity()
    assert "launch" not in plain
    assert "evaluate_every_steps" not in plain
    assert settings(launch={"engine": "ddp", "processes": 2}).identity() == plain


def test_passes_over_each_domain_are_told_and_many_are_warned_about() -> None:
    # 100 steps of 10 rows; books have ceil(1000 / 64) = 16 rows, web ceil(9000 / 64) = 141.
    phases = (PhaseConfig(tokens=0.75, mix={"web": 3, "books": 1}), PhaseConfig(tokens=0.25))
    plan = settings(tokens=64_000, phases=phases).plan({"web": 9000, "books": 1000, "code": 0})
    books = 0.75 * 1 / 4 + 0.25 * 1000 / 10_000
    assert plan.shares == pytest.approx({"books": books, "code": 0, "web": 1 - books})
    assert plan.epochs == pytest.approx(
        {"books": books * 1000 / 16, "web": (1 - books) * 1000 / 141}
    )
    assert [warning[:29] for warning in plan.warnings()] == [
        "domain books is read 13.3 tim", "domain web is read 5.6 times,",
    ]  # fmt: skip
    assert not settings(epochs=4).plan({"web": 9000}).warnings()


def test_continuing_on_much_that_is_new_is_warned_about() -> None:
    plan = settings(epochs=1).plan({"law": 1600, "web": 8400})
    assert not plan.warnings()
    [warning] = plan.warnings(["web", "books"])
    assert warning.startswith(
        "16% of the tokens are of domains that the policy to continue has not"
    )
    assert not plan.warnings(["web", "law"])
    few = settings(epochs=1).plan({"law": 1400, "web": 8600})
    assert not few.warnings(["web"])


def test_what_ends_a_training_early_is_identity() -> None:
    assert "held_tokens" not in settings().identity()
    stopping = settings(stop_patience=2, held_tokens=500)
    assert stopping.identity()["held_tokens"] == 500
    assert stopping.identity()["evaluate_every_steps"] == 100


@pytest.mark.parametrize(
    "fields", [{"stop_patience": 2}, {"keep_best": True}, {"prompts": ["The"]}]
)
def test_what_needs_looks_is_refused_without_them(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="set held_tokens and evaluate_every_steps above 0"):
        settings(**fields, evaluate_every_steps=0)
