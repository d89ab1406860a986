"""The terminal chat, driven through a pseudo terminal: Chinese, history, comparison, Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.generate import generate
from model.weights import load_model
from storage.tokenizer import ChatTokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Terminal:
    """A running `bessemer chat`."""

    process: subprocess.Popen[bytes]
    descriptor: int
    seen: str = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What was shown up to some text."""
        deadline = time.monotonic() + seconds
        raw = b""
        while text not in self.seen:
            ready, _, _ = select.select([self.descriptor], [], [], deadline - time.monotonic())
            assert ready, self.seen
            raw += os.read(self.descriptor, 1 << 16)
            try:
                self.seen, raw = self.seen + raw.decode(), b""
            except UnicodeDecodeError:
                continue  # the rest of a character is on its way
        shown, _, self.seen = self.seen.partition(text)
        return shown.replace("\r", "")

    def say(self, line: str) -> str:
        """What is shown after a line, up to the next prompt."""
        os.write(self.descriptor, f"{line}\n".encode())
        self.until("\n")  # the terminal's echo
        self.seen = f"\n{self.seen}"
        return self.until("\n> ").strip()


@pytest.fixture(scope="module")
def terminal(
    tmp_path_factory: pytest.TempPathFactory, policies: dict[str, Path]
) -> Iterator[Terminal]:
    """One talk with two checkpoints."""
    folder = tmp_path_factory.mktemp("chat")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable, "-c", "from flows.cli import main; main()", "chat",
            *(f"{name}={files}" for name, files in policies.items()), "--threads", "1",
        ],
        cwd=ROOT,
        env={**os.environ, "BESSEMER_HOME": str(folder), "TERM": "dumb", "PYTHONUTF8": "1"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    terminal = Terminal(process, ours)
    terminal.until("> ")
    yield terminal
    os.write(ours, b"/quit\n")
    assert process.wait(30) == 0


def test_checkpoints_answer_chinese_with_the_history_and_the_better_is_kept(
    terminal: Terminal, policies: dict[str, Path]
) -> None:
    terminal.say("/set temperature 0")
    assert "max_tokens=24" in terminal.say("/set max_tokens 24")
    shown = terminal.say("猫吃什么？")
    first, _, second = shown.partition("\n[2] two: ")
    model = load_model(policies["one"]).requires_grad_(False)
    tokenizer = ChatTokenizer(policies["one"] / "tokenizer")

    def answered(messages: list[dict[str, str]]) -> str:
        ids = tokenizer.render(messages, for_generation=True).ids
        given = {"temperature": 0.0, "seed": 0, "eos": tokenizer.im_end, "pad": tokenizer.pad}
        made = generate(model, [ids], max_new_tokens=24, **given)  # type: ignore[arg-type]
        return tokenizer.decode(made.answer(0))

    asked = [{"role": "user", "content": "猫吃什么？"}]
    assert first == f"[1] one: {answered(asked)}"
    terminal.say("/system Be rude.")  # later than the answers
    kept = terminal.say("/prefer 2").removeprefix("kept in ").strip()
    pair = json.loads(Path(kept).read_text("utf-8"))
    assert pair["prompt"] == asked
    assert pair["chosen_model"] == "two"
    terminal.say("/system")
    # the conversation goes on with the answer that was preferred
    history = [
        *asked,
        {"role": "assistant", "content": pair["chosen"]},
        {"role": "user", "content": "Why?"},
    ]
    assert terminal.say("Why?").startswith(f"[1] one: {answered(history)}\n")
    assert second


def test_commands_and_what_is_wrong_with_them(terminal: Terminal) -> None:
    terminal.say("/new")
    assert terminal.say("/undo") == "the conversation is empty; say something first"
    assert terminal.say("/prefer 1").startswith("/prefer N takes one of the 0 answers")
    assert terminal.say("/nix") == "there is no command /nix; /help lists them"
    assert "there is no setting 'heat'" in terminal.say("/set heat 1")
    assert terminal.say("/set top_p 2") == "top_p cannot be 2"
    assert "/system TEXT" in terminal.say("/help")


def test_ctrl_c_stops_an_answer_and_not_the_talk(terminal: Terminal) -> None:
    terminal.say("/set max_tokens 4000")
    os.write(terminal.descriptor, "讲一个故事\n".encode())
    terminal.until("[1] one: ")
    os.kill(terminal.process.pid, signal.SIGINT)
    terminal.until("(stopped)", seconds=10)
    terminal.until("> ")
    terminal.say("/set max_tokens 5")
    assert "[2] two: " in terminal.say("/again")
