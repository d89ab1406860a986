"""The arithmetic of compute, by hand."""

import json
import math

import pytest
from typer.testing import CliRunner

from conf.mistakes import RecipeError
from flows.budget import GROWTH, answer, loss, read_question
from flows.cli import app
from flows.costs import steps_of


def values(*words: str) -> dict[str, float]:
    return {line.what: line.value for line in answer(read_question(words))}


def test_amounts_are_read_with_their_units() -> None:
    assert read_question(["parameters=160M", "tokens=3.2B", "flops=3e21", "peak=989T"]) == {
        "parameters": 160e6,
        "tokens": 3.2e9,
        "flops": 3e21,
        "peak": 989e12,
    }


def test_what_is_no_question_is_refused_by_word() -> None:
    with pytest.raises(RecipeError) as caught:
        read_question(["day=3", "tokens=many", "mfu=0"])
    assert [mistake.place for mistake in caught.value.mistakes] == ["day=3", "tokens=many", "mfu=0"]
    with pytest.raises(ValueError, match="needs something to go by"):
        answer({})
    with pytest.raises(ValueError, match="needs accelerators, peak as well") as error:
        answer({"days": 3.0})
    assert "days=3" in str(error.value)


def test_a_model_wants_twenty_tokens_a_parameter_and_data_a_twentieth() -> None:
    assert values("parameters=160M")["tokens"] == 3.2e9
    assert values("tokens=3.2B")["parameters"] == 160e6
    assert values("parameters=160M")["compute"] == 6 * 160e6 * 3.2e9


def test_chinchilla_itself_comes_out_of_its_compute() -> None:
    # Chinchilla: 70B parameters, 1.4T tokens (Hoffmann et al. 2022, table 1)
    found = values(f"flops={6 * 70e9 * 1.4e12:.0f}")
    assert found["parameters"] == pytest.approx(70e9)
    assert found["tokens"] == pytest.approx(1.4e12)


def test_accelerators_and_days_give_the_best_model() -> None:
    # 8 x 989e12 x 0.5 x 7 x 86,400 = 2.3926e21 FLOPs; N = sqrt(C / 120) = 4.465e9
    found = values("accelerators=8", "days=7", "peak=989T", "mfu=0.5")
    compute = 8 * 989e12 * 0.5 * 7 * 86_400
    assert found["compute"] == pytest.approx(compute)
    assert found["parameters"] == pytest.approx(math.sqrt(compute / 120))
    assert found["tokens"] == pytest.approx(20 * found["parameters"])
    # With the data given, the rest of the compute goes into the model, and the other way round.
    assert values("accelerators=8", "days=7", "peak=989T", "mfu=0.5", "tokens=10B")[
        "parameters"
    ] == pytest.approx(compute / 6e10)
    fixed = values("accelerators=8", "days=7", "peak=989T", "mfu=0.5", "parameters=1B")
    assert fixed["tokens"] == pytest.approx(compute / 6e9)


def test_the_time_of_a_run_follows_from_the_peak() -> None:
    # 6 x 1e9 x 2e10 = 1.2e20 FLOPs at 4 x 1e14 x 0.4 = 1.6e14 a second: 750,000 s
    found = values("parameters=1B", "accelerators=4", "peak=100T")
    assert found["time"] == pytest.approx(750_000 / 86_400)


def test_ten_times_the_compute_by_both_rules() -> None:
    assert GROWTH == {"Chinchilla": (3.16, 3.16), "Kaplan": (5.32, 1.86)}
    lines = [line for line in answer({"parameters": 1e9}) if "10 x" in line.what]
    assert [line.value for line in lines] == pytest.approx([3.16e9, 63.2e9, 5.32e9, 37.2e9])


def test_the_loss_at_another_size_moves_by_the_law() -> None:
    # 1.69 + 406.4 / (7e10)^0.34 + 410.7 / (1.4e12)^0.28 = 1.69 + 0.0834 + 0.1633
    assert loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.001)
    found = values("parameters=20M", "tokens=400M", "loss=3.9", "at_parameters=80M")
    change = 406.4 * (80e6**-0.34 - 20e6**-0.34)
    assert found["loss"] == pytest.approx(3.9 + change)
    with pytest.raises(ValueError, match="needs tokens, loss as well"):
        answer({"parameters": 2e7, "at_parameters": 8e7})


def test_steps_are_samples_over_batch_accumulation_and_ranks() -> None:
    assert steps_of(1_280_000, 16, 4, 4) == 5_000
    assert steps_of(1_280_001, 16, 4, 4) == 5_001


def test_the_command_line_answers_in_a_table_and_in_json() -> None:
    told = CliRunner().invoke(app, ["plan", "--budget", "parameters=160M", "peak=100T"])
    assert told.exit_code == 0
    assert "3.2B" in told.stdout
    assert "x 5.32 (Kaplan)" in told.stdout
    lines = json.loads(
        CliRunner().invoke(app, ["plan", "--budget", "parameters=160M", "--json"]).stdout
    )
    assert {"what": "tokens", "value": 3.2e9, "unit": "", "rule": ""} in lines
