"""Installed distributions by what they need."""

from importlib import metadata


def plain(name: str) -> str:
    """The name as every spelling of it is compared."""
    return name.lower().replace("_", "-").replace(".", "-")


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions with everything that they need."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = plain(left.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in wanted:
            end = next((i for i, letter in enumerate(line) if letter in " ;<>=!~[("), len(line))
            left.append(line[:end])
    return seen
