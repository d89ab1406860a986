"""Settings of the stage chats."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import Settings, SourceSpec


class ChatsConfig(Settings):
    """Which conversations are read, and which are held out."""

    sources: tuple[SourceSpec, ...]
    """Files of conversations: JSON or JSON lines (.gz, .zst), or Parquet, in any known layout."""
    held_share: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the first user turns that is held out; a hash of the turn decides."""
    on_bad_row: Literal["skip", "fail"] = "skip"
    """`skip` counts a row that cannot be read and goes on; `fail` ends the stage at the first."""
    keep_duplicates: bool = False
    """Whether a conversation may stand in the files more than once."""
