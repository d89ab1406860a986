"""How an end is put into words, from the notes of the ranks and the launcher's output."""

from pathlib import Path

import pytest

from conf.contract import ExitCode, ExitFile
from tasks.explain import RankNote, explain, read_notes, tail_of


def ending(
    tmp_path: Path,
    *notes: RankNote,
    output: str = "",
    launcher_code: int = 1,
    is_short_of_memory: bool = False,
    ranks: int = 2,
) -> ExitFile:
    (tmp_path / "output.log").write_text(output)
    return explain(
        notes,
        ranks=ranks,
        launcher_code=launcher_code,
        output=tmp_path / "output.log",
        has_result=True,
        is_short_of_memory=is_short_of_memory,
        seconds=1.0,
    )


def note(rank: int, code: int | None, error: str = "", time: float = 0.0) -> RankNote:
    return RankNote(rank=rank, pid=100 + rank, code=code, error=error, time=time)


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:47288"


def test_the_first_error_is_named_not_its_echo(tmp_path: Path) -> None:
    ended = ending(tmp_path, note(0, 1, LOST, 1.0), note(1, 1, "ValueError: bad shape", 2.0))
    assert ended.reason == "rank 1 of 2 failed: ValueError: bad shape"


def test_a_killed_rank_is_named_not_the_one_that_lost_it(tmp_path: Path) -> None:
    # It stopped the other one because of this.
    torchrun = "  exitcode  : -15 (pid: 100)  (SIGTERM)\n  exitcode  : -9 (pid: 101)  (SIGKILL)\n"
    ended = ending(tmp_path, note(0, 1, LOST, 1.0), note(1, None), output=torchrun)
    assert ended.reason.startswith("rank 1 of 2 was killed (SIGKILL)")


def test_the_deepspeed_launchers_words_name_the_signal(tmp_path: Path) -> None:
    output = "[launch.py:325] ['python'] exits with return code = -11\n"
    ended = ending(tmp_path, note(0, 143), note(1, None), output=output)
    assert ended.reason.startswith("rank 1 of 2 crashed (SIGSEGV)")


def test_a_launcher_that_answers_0_is_not_believed(tmp_path: Path) -> None:
    # The deepspeed runner ends with 0 when its launcher was killed by a signal.
    assert ending(tmp_path, note(0, 0), note(1, None), launcher_code=0).code == ExitCode.FAILED
    assert ending(tmp_path, note(0, 0), launcher_code=0).code == ExitCode.FAILED
    assert ending(tmp_path, note(0, 0), note(1, 0), launcher_code=0).code == ExitCode.DONE


def test_a_kill_for_memory_is_told_from_a_kill_by_hand(tmp_path: Path) -> None:
    def reason(is_short: bool) -> str:
        return ending(
            tmp_path, note(0, None), launcher_code=-9, ranks=1, is_short_of_memory=is_short
        ).reason

    assert "out of memory: the kernel killed it" in reason(True)
    assert "was killed (SIGKILL), by hand or" in reason(False)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "out of memory"),
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory",
            "out of memory",
        ),
        ("DistBackendError: Watchdog caught collective operation timeout", "until the time-out"),
        ("RuntimeError: Timed out waiting 1800000ms for recv operation", "until the time-out"),
        (LOST, "lost the connection to another rank"),
        ("ModuleNotFoundError: No module named 'deepspeed'", "cannot import deepspeed"),
    ],
)
def test_known_errors_have_words(tmp_path: Path, error: str, words: str) -> None:
    assert words in ending(tmp_path, note(0, 1, error), note(1, 143)).reason


@pytest.mark.parametrize("code", [ExitCode.DIVERGED, ExitCode.GATE, ExitCode.REQUEUE])
def test_the_workers_own_codes_are_kept(tmp_path: Path, code: ExitCode) -> None:
    assert ending(tmp_path, note(0, code), note(1, 143)).code == code


def test_a_launcher_that_never_started_a_rank_is_explained(tmp_path: Path) -> None:
    assert (
        "cannot import deepspeed"
        in ending(tmp_path, output="ModuleNotFoundError: No module named 'deepspeed'\n").reason
    )
    assert "after 0 of 2 ranks had started" in ending(tmp_path, output="usage: ...\n").reason


def test_nothing_was_written_at_all(tmp_path: Path) -> None:
    assert read_notes(tmp_path) == []
    assert tail_of(tmp_path / "absent") == []


def test_the_tail_of_a_long_file_is_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "long").write_text("".join(f"第{i}行\n" for i in range(50_000)), "utf-8")
    assert tail_of(tmp_path / "long", 2) == ["第49998行", "第49999行"]
