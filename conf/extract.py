"""Settings of extract: from raw files to documents."""

from typing import Annotated, Literal

from pydantic import Field

from conf.settings import RUNTIME, Settings, SourceSpec

PersonalData = Literal["email", "ip", "phone", "identity"]


class NormaliseConfig(Settings):
    """How a text is brought into one form."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normal form; NFKC also makes full-width Latin letters and digits half-width."""
    width: Literal["keep", "half"] = "keep"
    """`half` makes full-width Latin letters and digits half-width, and leaves punctuation alone."""
    punctuation: Literal["keep", "by_script"] = "keep"
    """`by_script` makes `, . ; : ! ?` Chinese after a Han character, where no letter or digit follows,
    and Chinese ones plain after a Latin letter or digit where no Han character follows."""
    is_without_controls: bool = True
    """Whether control, zero-width and bidirectional characters are removed, odd spaces made plain."""
    max_blank_lines: Annotated[int | None, Field(ge=0, le=1)] = 1
    """Blank lines that may follow each other, trailing spaces removed; none leaves them alone."""
    max_punctuation_run: Annotated[int | None, Field(ge=1, le=5)] = None
    """Length to which runs of five or more equal punctuation marks are cut; none leaves them."""


class PageConfig(Settings):
    """How the main text of a web page is found, and what a page may cost."""

    engine: Literal["two_step", "cheap"] = "two_step"
    """`two_step`: a cheap extraction decides (length, language, links), and only pages that pass are
    given to trafilatura; `cheap` keeps the cheap text."""
    min_chars: Annotated[int, Field(ge=0)] = 15
    """Visible text below this is refused as `short`."""
    max_link_share: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Share of the visible text inside links above which a page is refused as `links`."""
    max_bytes: Annotated[int, Field(ge=1024)] = 8 << 20
    """A larger page is refused as `large`, unread."""
    max_elements: Annotated[int, Field(ge=100)] = 100_000
    """A page with more elements is refused as `elements`."""
    cpu_seconds: Annotated[float, Field(gt=0)] = 20.0
    """Processor time of one page; a page that takes more is refused as `timeout`."""
    memory_bytes: Annotated[int, Field(ge=1 << 28)] = 4 << 30
    """Address space of the process that reads pages; a page that needs more is refused."""


class ExtractConfig(Settings):
    """From raw files (crawls, pages, records, plain text) to documents with language and split."""

    sources: tuple[SourceSpec, ...] = ()
    """The raw files, in order; a file that appears later becomes a new shard."""
    block_lists: tuple[SourceSpec, ...] = ()
    """Lists of addresses to refuse, before anything is parsed: a host a line (with its subdomains),
    a host and path (with what lies below), or a hosts file (`0.0.0.0 host`)."""
    url_expressions: tuple[SourceSpec, ...] = ()
    """Lists of regular expressions, one a line, as UT1's `expressions`: an address in which one is found
    (in any case) is refused. They take linear time; back-references and look-around are errors."""
    url_words: tuple[str, ...] = ()
    """A page whose address has one of these words (letters and digits in a row) is refused."""
    languages: tuple[str, ...] = ("zh", "en")
    """Languages that are kept, ISO 639; empty keeps all."""
    held_share: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of documents held out of training, by a hash of the document; once and for all."""
    text_documents: Literal["blank_line", "file", "line"] = "blank_line"
    """What one document is in a plain text file."""
    mask_personal: tuple[PersonalData, ...] = ()
    """Personal data that is replaced by its kind, as `[EMAIL]`: mail and public IP addresses, phone and
    identity numbers of China."""
    normalise: NormaliseConfig = NormaliseConfig()
    """How a text is brought into one form."""
    pages: PageConfig = PageConfig()
    """How the main text of a web page is found."""
    max_record_chars: Annotated[int, Field(ge=1)] = 200_000_000
    """A record with a longer text is refused as `large`."""
    max_document_chars: Annotated[int, Field(ge=0)] = 0
    """A longer text (a book) is cut, at the ends of paragraphs, into documents of at most this many
    characters, each with its own split; 0 leaves every text whole."""
    bucket_bytes: Annotated[int, Field(ge=1)] = 16 << 20
    """Files below a quarter of this are read together, in shards of about this size."""
    shard_bytes: Annotated[int, Field(ge=1 << 12)] = 256 << 20
    """A larger file of JSON lines (not compressed), Parquet (by row groups), WARC or WAT becomes several
    shards of at least this size: each can use a core, and is what a resumed run keeps."""
    page_wall_seconds: Annotated[float, RUNTIME, Field(gt=0)] = 300.0
    """Wall-clock limit of one page, for a page process that hangs without using the processor."""
