"""What the page of a task says of its progress."""

import json
from pathlib import Path

from flows.progress import TAIL_BYTES, Progress, last_row


def test_time_left_is_told_by_the_pace_since_the_first_report(tmp_path: Path) -> None:
    now = 0.0
    progress = Progress("pretrain", clock=lambda: now)
    # Resumed at step 600 of 1,000.
    assert progress.words(600, 1000, "steps", tmp_path) == "pretrain: 600 of 1,000 steps"
    now = 30.0
    rows = '{"step": 649, "loss": 9}\n{"step": 650, "loss": 2.31049, "tokens_per_second": 9870}\n'
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 6')
    # 50 steps in 30 s: 350 more take 210 s.
    assert progress.words(650, 1000, "steps", tmp_path) == (
        "pretrain: 650 of 1,000 steps, 2.310 loss, 9,870 tokens/s, 3.5 min left"
    )


def test_the_last_whole_line_is_read_however_long_the_file_is(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text("")
    assert last_row(path) == {}
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5000)))
    assert last_row(path) == {"step": 4999}


def test_a_row_with_figures_of_many_domains_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    looked = {f"held_bits_per_byte/domain_{n}": 1.0 + n for n in range(100)}
    path.write_text(f'{{"step": 1}}\n{json.dumps(looked)}\n')
    assert last_row(path) == looked
    path.write_text(json.dumps({"step": 2, "text": "x" * TAIL_BYTES}) + "\n")
    assert last_row(path) == {}
