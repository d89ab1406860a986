"""docker-compose.yml as Compose reads it: variables filled in, anchors merged."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"
VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?P<how>:[-?+])?(?P<word>[^}]*)\})")


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file with these variables. Raises KeyError with Compose's words for one that is required."""
    return _filled(_written(), variables)


def variables() -> dict[str, list[str]]:
    """Every variable that the file names, and the ways in which it does: `:-`, `:?`, `:+` or none."""
    found: dict[str, list[str]] = {}
    for match in VARIABLE.finditer(FILE.read_text("utf-8")):
        if name := match["name"]:
            found.setdefault(name, []).append(match["how"] or "")
    return found


@cache
def _written() -> Any:
    return yaml.safe_load(FILE.read_text("utf-8"))


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    return VARIABLE.sub(lambda m: _value(m, variables), value) if isinstance(value, str) else value


def _value(match: "re.Match[str]", variables: Mapping[str, str]) -> str:
    if match[0] == "$$":
        return "$"
    value = variables.get(match["name"], "")
    if match["how"] == ":?" and not value:
        raise KeyError(f"{match['name']}: {match['word']}")
    if match["how"] == ":+":
        return match["word"] if value else ""
    return value or match["word"]
