"""The services of docker-compose.yml without Docker: its very commands, users, volumes and mounts.

All run in one network namespace, in which the services' names stand for its loopback; each has a root of
its own, read-only but for its volumes and tmpfs, on which this machine's programs lie, and neither rights
nor a way to gain them. What cannot be had here stands in: Postgres and Redis of the distribution for their
images, moto for the S3 gateway.
"""

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.deploy.compose import ROOT

Result = TypeVar("Result")
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"))), Path("/usr/bin"))
PATH = f"{Path(sys.executable).parent}:{POSTGRES}:/usr/local/bin:/usr/bin:/bin"
USER = "10001:10001"
"""Of the images that the Dockerfile makes."""
NEW_NETWORK = 0x40000000
STAND_INS = {
    "postgres": "postgres -D /var/lib/postgresql/data -c listen_addresses=127.0.0.1 -c fsync=off",
    "s3": "moto_server --host 127.0.0.1 --port 7070",
}
HEALTH = {"s3": ["CMD", "bash", "-c", "echo > /dev/tcp/127.0.0.1/7070"]}
INITDB = """
printf %s "$POSTGRES_PASSWORD" > /tmp/password
initdb --pgdata=/var/lib/postgresql/data --username=postgres --pwfile=/tmp/password \\
  --auth-local=trust --auth-host=scram-sha-256
"""


@dataclass
class Host:
    """The machine on which the services run; its processes end with it."""

    folder: Path
    services: dict[str, Any]
    holder: "subprocess.Popen[bytes]"
    running: dict[str, "subprocess.Popen[bytes]"] = field(
        default_factory=dict[str, "subprocess.Popen[bytes]"]
    )

    def start(self, *names: str) -> None:
        """Start services; the output of each goes to NAME.log."""
        for name in names:
            with (self.folder / f"{name}.log").open("ab") as output:
                self.running[name] = subprocess.Popen(
                    self.command(name), stdout=output, stderr=output, start_new_session=True
                )

    def stop(self, name: str) -> None:
        """End a service with all its processes, as Docker ends a container."""
        process = self.running.pop(name)
        # What the image of Postgres asks for; at SIGTERM it would wait for its clients to go.
        process.send_signal(signal.SIGINT if name == "postgres" else signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def run(self, name: str, command: Sequence[str] = (), seconds: float = 1200) -> str:
        """Run a service that ends, or a command beside one that does not; what it wrote."""
        ended = subprocess.run(
            self.command(name, command), capture_output=True, text=True, timeout=seconds
        )
        assert ended.returncode == 0, f"{name}: {ended.stdout}{ended.stderr}"
        return ended.stdout

    def is_healthy(self, name: str) -> bool:
        """What the service's own health check says."""
        kind, *test = HEALTH.get(name) or self.services[name]["healthcheck"]["test"]
        command = ["sh", "-c", *test] if kind == "CMD-SHELL" else test
        return subprocess.run(self.command(name, command), capture_output=True).returncode == 0

    def wait(self, *names: str, seconds: float = 1200) -> None:
        """Until services are healthy."""
        for name in names:
            started = time.monotonic()
            while not self.is_healthy(name):
                said = (self.folder / f"{name}.log").read_text("utf-8", "replace")[-3000:]
                assert self.running[name].poll() is None, said
                assert time.monotonic() - started < seconds, said
                time.sleep(5)

    def inside(self, call: Callable[[], Result]) -> Result:
        """What a call gives whose sockets are opened on this host."""
        with ThreadPoolExecutor(1, initializer=self._enter) as thread:
            return thread.submit(call).result()

    def _enter(self) -> None:
        network = os.open(f"/proc/{self.holder.pid}/ns/net", os.O_RDONLY)
        assert ctypes.CDLL(None, use_errno=True).setns(network, NEW_NETWORK) == 0
        os.close(network)

    def command(self, name: str, command: Sequence[str] = ()) -> list[str]:
        """The process that runs the service's own command, or another: beside its own where that runs."""
        if command and name in self.running:
            target = ("--target", str(self.running[name].pid))
            return ["nsenter", *target, "--mount", "--net", "--root", *self._as_user(name, command)]
        spec = self.services[name]
        own = shlex.split(STAND_INS[name]) if name in STAND_INS else spec.get("command", [])
        user = (spec.get("user") or USER).partition(":")[0]
        script = "\n".join(["set -e", *self._mounts(name, user), 'exec "$@"'])
        return [
            *("nsenter", f"--net=/proc/{self.holder.pid}/ns/net"),
            *("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"),
            *("chroot", str(self.folder / "root"), *self._as_user(name, command or own)),
        ]

    def _as_user(self, name: str, command: Sequence[str]) -> Iterator[str]:
        """A command with the rights and the environment of a service."""
        spec = self.services[name]
        user, _, group = (spec.get("user") or USER).partition(":")
        home = "/home/bessemer" if user in USER else "/tmp"
        settings = {"PATH": PATH, "HOME": home, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        settings |= spec.get("environment") or {}
        yield from ("setpriv", "--reuid", user, "--regid", group or user, "--clear-groups")
        yield from ("--no-new-privs", "--bounding-set", "-all", "--inh-caps", "-all")
        yield from ("env", "-i", "-C", _working_folder(spec))
        yield from (f"{key}={value}" for key, value in settings.items())
        yield from command

    def _mounts(self, name: str, user: str) -> Iterator[str]:
        root = self.folder / "root"
        yield f"mount -t tmpfs -o mode=755 none {root}"
        programs = {"/usr", "/bin", "/lib", "/lib64", "/etc", sys.prefix, sys.base_prefix}
        for path in sorted({*programs, str(ROOT)}):
            if Path(path).exists():
                yield f"mkdir -p {root}{path}; mount --bind -o ro {path} {root}{path}"
        for path in ("/proc", "/dev"):
            yield f"mkdir -p {root}{path}; mount --rbind {path} {root}{path}"
        yield f"mkdir -p {root}/opt/bessemer; mount --bind -o ro {ROOT} {root}/opt/bessemer"
        yield f"mount --bind {self.folder / 'hosts'} {root}/etc/hosts"
        for place in self.services[name].get("tmpfs", ()):
            path = place.partition(":")[0]
            yield f"mkdir -p {root}{path}; mount -t tmpfs -o mode=1777 none {root}{path}"
        for volume in self.services[name].get("volumes", ()):
            source, target, *rights = volume.split(":")
            if source.startswith((".", "/")):
                path = (ROOT / source).resolve()
            else:
                path = self.folder / "volumes" / source
                yield f"mkdir -p {path}; chown {user} {path}"
            yield f"mkdir -p $(dirname {root}{target})"
            yield f"if [ -d {path} ]; then mkdir -p {root}{target}; else touch {root}{target}; fi"
            yield f"mount --bind -o {(rights or ['rw'])[0]} {path} {root}{target}"
        yield f"mkdir -p {root}{_working_folder(self.services[name])}"
        yield f"mount -o remount,ro {root}"


def _working_folder(spec: dict[str, Any]) -> str:
    own = "/opt/bessemer" if spec["image"].startswith("bessemer") else "/"
    return spec.get("working_dir", own)


@contextlib.contextmanager
def open_host(folder: Path, services: dict[str, Any]) -> Generator[Host]:
    """A host with none of the services running."""
    for name in ("root", "volumes"):
        (folder / name).mkdir(exist_ok=True)
    names = " ".join(services)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {names}\n", "utf-8")
    command = ["unshare", "--net", "sh", "-c", "ip link set lo up; echo up; exec sleep infinity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"up\n"
        host = Host(folder, services, holder)
        try:
            yield host
        finally:
            _end_all(Path(f"/proc/{holder.pid}/ns/net").readlink())


def _end_all(network: Path) -> None:
    """End every process of a network namespace, those too that left their service's group."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "ns" / "net").readlink() == network:
                os.kill(int(process.name), signal.SIGKILL)


def initialise_postgres(host: Host) -> None:
    """What the image of Postgres does at its first start."""
    host.run("postgres", ["sh", "-c", INITDB])
