"""A worker without torch that counts; it fails, hangs and resumes as its settings say."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

RANK = int(os.environ.get("RANK", "0"))


def main() -> None:
    """Count to `steps`, saving after each one; at step `act_at` on rank `act_rank` do `act`."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    settings, state, logs = job["settings"], Path(job["state"]), Path(job["logs"])
    is_asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        is_asked.append(number)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if settings["is_deaf"] else ask)
    with (logs / f"started.{RANK}").open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    saved = state / f"count.{RANK}"
    step = int(saved.read_text()) if saved.exists() else 0
    say(f"begins at {step}")
    while step < settings["steps"]:
        if settings["act"] and step == settings["act_at"] and settings["act_rank"] == RANK:
            act(settings["act"], logs)
        time.sleep(settings["step_seconds"])
        step += 1
        replace(saved, str(step))
        if RANK == 0:
            show(logs, step, settings["steps"])
        if is_asked:
            say(f"saved at {step}")
            sys.exit(75)
    if RANK == 0:
        (Path(job["files"]) / "count.txt").write_text(str(step))
        replace(
            logs / "result.json",
            json.dumps({"count": step, "threads": os.environ["OMP_NUM_THREADS"]}),
        )


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"rank {RANK} {text}\n")
    sys.stdout.flush()


def act(what: str, logs: Path) -> None:
    """Do what the settings ask for, once: a second start of the job gets past it."""
    mark = logs / f"acted.{RANK}"
    if mark.exists():
        return
    mark.touch()
    say(f"is about to {what}")
    match what:
        case "raise":
            raise RuntimeError("配置错误: the thing broke")
        case "memory":
            bytearray(1 << 62)
        case "import":
            __import__("a_module_that_is_not_there")
        case "diverge":
            sys.exit(76)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(3600)
        case _:
            raise ValueError(what)


def show(logs: Path, step: int, total: int) -> None:
    """Write progress.json, as a real worker does."""
    progress = {"step": step, "total": total, "unit": "steps", "updated": time.time()}
    replace(logs / "progress.json", json.dumps(progress))


def replace(path: Path, text: str) -> None:
    """Replace a file in one step."""
    partial = path.with_name(f"{path.name}.{RANK}.partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    main()
