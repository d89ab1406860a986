"""How a settings class is written, and which part of it is identity."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

RUNTIME = "runtime"
"""Marks a setting that does not change what is computed; it is left out of the fingerprint."""


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, docstrings under fields are the help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is computed, as plain JSON values; runtime ones are absent."""
        return {
            name: _identity_of(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if RUNTIME not in field.metadata
        }

    def source_fields(self) -> Iterator[tuple[str, tuple["SourceSpec", ...]]]:
        """Every field that names outside files, with what it names."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SourceSpec):
                yield name, (value,)
            elif isinstance(value, tuple) and value and isinstance(value[0], SourceSpec):
                yield name, cast("tuple[SourceSpec, ...]", value)

    def refuse_inputs(self, given: Collection[str]) -> None:
        """Raises ValueError where the settings need other inputs, or files, than those whose names are given."""


class SourceSpec(Settings):
    """Outside files that a stage reads, and how to read them.

    The files themselves enter a fingerprint by their content and order, never by their path.
    """

    path: Annotated[str, RUNTIME]
    """File, glob (`**` allowed) or folder; relative to the artifact when `node` is given, else to
    the working directory. `s3://bucket/..` names files on S3; the environment says who reads them
    (as with any S3 client) and how much room copies may take here (`BESSEMER_FETCHED_BYTES`)."""
    node: Annotated[str | None, RUNTIME] = None
    """Name of the node whose artifact holds the files; none for the file system."""
    domain: str = "default"
    """What the documents are: `web`, `books`, ... Mixtures and figures are per domain. `{folder}` is the
    name of the folder that a file lies in."""
    format: Literal[
        "auto", "warc", "wat", "html", "jsonl", "json", "parquet", "csv", "text", "markdown",
        "latex", "code",
    ] = "auto"  # fmt: skip
    """Layout of the files; `auto` goes by the file name. `warc` is also WET, `wat` the metadata of a
    crawl, `html` also a tar of pages, `code` any source code: a document a file."""
    text: str = "text"
    """Field that holds the text, or a template such as `{title}\\n{text}`, for records."""
    split: Literal["auto", "train", "held"] = "auto"
    """`held` keeps every record out of training; `auto` lets a hash of the record decide."""
    language: str | None = None
    """Language of all records, where it is known; else it is found per record."""
    is_optional: Annotated[bool, RUNTIME] = False
    """Whether no matching file is allowed."""


def _raw(sources: tuple[SourceSpec, ...]) -> tuple[SourceSpec, ...]:
    if not sources:
        raise ValueError("sources names no folder; give sources: [{path: FOLDER}]")
    # Files of a model are told apart by their names; no layout of documents applies.
    return tuple(spec.model_copy(update={"format": "text"}) for spec in sources)


ModelFolder = Annotated[tuple[SourceSpec, ...], AfterValidator(_raw), Field(validate_default=True)]
"""The folder of a model from elsewhere; it has to be given."""


def _identity_of(value: object) -> Any:
    match value:
        case Settings():
            return value.identity()
        case tuple() | list():
            return [_identity_of(item) for item in cast("list[object]", value)]
        case dict():
            return {str(k): _identity_of(v) for k, v in cast("dict[object, object]", value).items()}
        case None | bool() | int() | float() | str():
            return value
        case Path():
            raise ValueError(f"{value}: a path has no stable identity; mark the setting as runtime")
        case _:
            raise ValueError(f"{value!r} has no stable form; use numbers, text, lists or settings")
