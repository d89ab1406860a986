"""Machines of a DeepSpeed host file: who they are, and how a command is started on them."""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.launch import LaunchConfig

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hosts(launch: LaunchConfig) -> list[str]:
    """Names of the nodes, the run's own first; the top ones of the file, as DeepSpeed counts.

    Raises ValueError for a file that is not there, or not fit for the launch.
    """
    path = Path(launch.hostfile).expanduser()
    if not path.is_file():
        raise ValueError(f"launch.hostfile={path} is no file; give lines of `HOST slots=N`")
    slots: dict[str, int] = {}
    for line in path.read_text("utf-8").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.match(line.strip())
        if found is None or found[1] in slots:
            raise ValueError(f"{path}: {line!r} is not `HOST slots=N`, or names a host again")
        slots[found[1]] = int(found[2])
    if len(slots) < launch.nodes:
        raise ValueError(
            f"{path} names {len(slots)} hosts, launch.nodes={launch.nodes}; add hosts or lower it"
        )
    hosts = list(slots)[: launch.nodes]
    for host in hosts:
        if slots[host] < launch.processes:
            raise ValueError(
                f"{path} gives {host} {slots[host]} slots, launch.processes={launch.processes}; raise the "
                f"slots or lower it"
            )
    if shutil.which("ssh") is None:
        raise ValueError("launch.hostfile needs ssh, which is not on the PATH; install it")
    return hosts


def over_ssh(host: str, variables: Mapping[str, str], command: Sequence[str]) -> list[str]:
    """A command as it is started on another host, which has this one's files under the same paths."""
    named = [f"{name}={value}" for name, value in variables.items()]
    return ["ssh", "-o", "BatchMode=yes", host, shlex.join(["env", *named, *command])]
