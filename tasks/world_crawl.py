"""The synthetic web, WARC file by WARC file: which pages there are, where, and what is true of them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from storage.world import LANGUAGES, Facts
from tasks.world_html import render_html
from tasks.world_junk import (
    Junk,
    boilerplate,
    garbage,
    other_language,
    repetition,
    spam,
    stub,
)
from tasks.world_overlap import OverlapIndex, jaccard, shingles_of
from tasks.world_pages import Prose, near_copy, sound_prose, with_leak
from tasks.world_warc import request, response, warcinfo

SITES = (
    ("northpaws.example", "www.zoo-diary.example"),
    ("openpark.example", "wiki.fauna.example"),
    ("news.biji.example", "feather.example"),
    ("garden-notes.example", "gongyuan.example"),
    ("blog.keepers.example", "dongwu.example"),
)
"""Hosts of sound pages; those of one line share a layout. A copy keeps the layout of what it copies,
or the frame around the text, as far as it is taken for text, would change the planted similarity."""
SOUND_HOSTS = tuple(host for hosts in SITES for host in hosts)
JUNK_HOSTS = ("pages.free-host.example", "old.mirror.example", "t3.links.example")
BLOCKED_HOSTS = ("paws.example", "luckywheel.example", "night-tables.example")
"""`northpaws.example` ends like the first, but is another host; hosts below a blocked one are blocked."""
BLOCKED_PREFIXES = ("", "www.", "cdn.m.")

NEAR_COPY_BINS = (
    (0.50, 0.55),
    (0.55, 0.60),
    (0.60, 0.65),
    (0.65, 0.70),
    (0.70, 0.75),
    (0.83, 0.87),
    (0.87, 0.91),
    (0.91, 0.95),
)
"""Similarities that are planted, equally often. None lies near 0.8, where a heading more or less decides."""
UNPLANNED_LIMIT = 0.58
"""No two sound pages that are not planned as copies come closer than this."""
SHARES = {
    "short": 0.06,
    "repetitive": 0.06,
    "garbage": 0.06,
    "boilerplate": 0.06,
    "other_language": 0.07,
    "blocked": 0.06,
    "exact_copy": 0.06,
    "near_copy": 0.15,
    "leak": 0.03,
}
"""Planted pages per sound page of a WARC file; every kind has at least one."""
TRIES_PER_PAGE = 200
JUNK_WRITERS: dict[str, Callable[[random.Random, str], Junk]] = {
    "short": stub,
    "repetitive": repetition,
    "garbage": garbage,
    "boilerplate": boilerplate,
    "blocked": spam,
}


@dataclass(frozen=True)
class Page:
    """One page and its truth."""

    url: str
    kind: str
    language: str
    title: str
    paragraphs: tuple[str, ...]
    markup: str | None = None
    of_url: str | None = None
    """The page that it copies."""
    jaccard: float | None = None
    """Exact similarity of its main text to that of the page it copies."""
    question: str | None = None
    """The exam question that it leaks."""

    def truth(self) -> dict[str, object]:
        """What `truth/pages.jsonl` says."""
        entry = asdict(self)
        del entry["paragraphs"], entry["markup"]
        return {**entry, "text": "\n".join(self.paragraphs)}


@dataclass
class Web:
    """Everything written so far; a new WARC file is planned against it."""

    facts: Facts
    seed: int
    exam: list[dict[str, str]]
    """Rows that pages may leak; with a `language`."""
    index: OverlapIndex = field(default_factory=OverlapIndex)
    originals: list[tuple[Page, Prose]] = field(default_factory=list[tuple[Page, Prose]])
    """Sound pages that nothing copies yet."""

    def write_warc(self, number: int, good_pages: int) -> tuple[list[Page], bytes]:
        """The pages of WARC file `number` and its bytes, which depend on earlier files only."""
        rng = random.Random(f"warc/{self.seed}/{number}")
        first = [self._sound(rng, number, serial) for serial in range(good_pages)]
        counts = {kind: max(1, round(share * good_pages)) for kind, share in SHARES.items()}
        first += [self._leak(rng, number, serial) for serial in range(counts["leak"])]
        for kind, writer in JUNK_WRITERS.items():
            first += [
                self._junk(kind, writer(rng, rng.choice(LANGUAGES)), rng, number, serial)
                for serial in range(counts[kind])
            ]
        first += [
            self._junk("other_language", other_language(rng), rng, number, serial)
            for serial in range(counts["other_language"])
        ]
        rng.shuffle(first)
        copies = [self._near_copy(rng, number, serial) for serial in range(counts["near_copy"])]
        copies += [self._exact_copy(rng, number, serial) for serial in range(counts["exact_copy"])]
        rng.shuffle(copies)
        pages = [*first, *copies]
        return pages, b"".join(_records(rng, number, pages))

    def _sound(self, rng: random.Random, number: int, serial: int) -> Page:
        prose = self._apart(rng, lambda: sound_prose(self.facts, rng, rng.choice(LANGUAGES)))
        url = _url(rng, SOUND_HOSTS, f"{prose.animal}-{number}-{serial}")
        page = Page(url, "good", prose.language, prose.title, prose.paragraphs)
        self.originals.append((page, prose))
        return page

    def _leak(self, rng: random.Random, number: int, serial: int) -> Page:
        row = rng.choice(self.exam)
        options = [f"{letter}. {row[letter]}" for letter in "ABCD"]

        def leak() -> Prose:
            sound = sound_prose(self.facts, rng, row["language"])
            return with_leak(rng, sound, row["question"], options)

        prose = self._apart(rng, leak)
        url = _url(rng, SOUND_HOSTS, f"quiz-{number}-{serial}")
        return Page(
            url, "leak", prose.language, prose.title, prose.paragraphs, question=row["question"]
        )

    def _apart(self, rng: random.Random, write: Callable[[], Prose]) -> Prose:
        """What `write` gives, far enough from all that is there."""
        for _ in range(TRIES_PER_PAGE):
            prose = write()
            shingles = shingles_of(prose.text)
            if self.index.nearest(shingles)[0] < UNPLANNED_LIMIT:
                self.index.add(f"{len(self.originals)}/{rng.getrandbits(64)}", shingles)
                return prose
        raise ValueError(
            f"no page unlike the others was found in {TRIES_PER_PAGE} tries; "
            "the world is too small for so many pages: lower good_pages or warcs"
        )

    def _junk(self, kind: str, junk: Junk, rng: random.Random, number: int, serial: int) -> Page:
        hosts = JUNK_HOSTS
        if kind == "blocked":
            hosts = [prefix + host for host in BLOCKED_HOSTS for prefix in BLOCKED_PREFIXES]
        elif kind == "other_language":
            hosts = SOUND_HOSTS
        url = _url(rng, hosts, f"{number}-{kind[:2]}{serial}")
        return Page(url, kind, junk.language, junk.title, junk.paragraphs, junk.markup)

    def _near_copy(self, rng: random.Random, number: int, serial: int) -> Page:
        low, high = NEAR_COPY_BINS[(serial + number) % len(NEAR_COPY_BINS)]
        for _ in range(TRIES_PER_PAGE):
            choice = rng.randrange(len(self.originals))
            page, original = self.originals[choice]
            copy = near_copy(rng, self.facts, original, low, high)
            if copy is None:
                continue
            shingles = shingles_of(copy.text)
            if self._is_close_to_another(shingles, original):
                continue
            self.originals.pop(choice)
            self.index.add(f"copy/{number}/{serial}", shingles)
            similarity = jaccard(shingles, shingles_of(original.text))
            return Page(
                _url(rng, _mirrors(page.url), f"{original.animal}-{number}-n{serial}"),
                "near_copy",
                copy.language,
                copy.title,
                copy.paragraphs,
                of_url=page.url,
                jaccard=round(similarity, 6),
            )
        raise ValueError(f"no copy at a Jaccard similarity of {low} was found; raise good_pages")

    def _is_close_to_another(self, shingles: frozenset[tuple[str, ...]], original: Prose) -> bool:
        own = self.index.nearest(shingles_of(original.text))[1]
        return self.index.nearest(shingles, ignore=(own or "",))[0] >= UNPLANNED_LIMIT

    def _exact_copy(self, rng: random.Random, number: int, serial: int) -> Page:
        page, original = self.originals.pop(rng.randrange(len(self.originals)))
        return Page(
            _url(rng, _mirrors(page.url), f"{original.animal}-{number}-e{serial}"),
            "exact_copy",
            page.language,
            page.title,
            page.paragraphs,
            of_url=page.url,
            jaccard=1.0,
        )


def _layout_of(host: str) -> int:
    for number, hosts in enumerate(SITES):
        if host in hosts:
            return number
    return sum(host.encode())


def _mirrors(url: str) -> tuple[str, ...]:
    return SITES[_layout_of(url.split("/")[2])]


def _url(rng: random.Random, hosts: Sequence[str], name: str) -> str:
    host = rng.choice(hosts)
    match rng.randrange(3):
        case 0:
            return f"https://{host}/{rng.randint(2008, 2024)}/{rng.randint(1, 12):02d}/{name}.html"
        case 1:
            return f"http://{host}/index.php?id={name}"
        case _:
            return f"https://{host}/pages/{name}/"


def _records(rng: random.Random, number: int, pages: list[Page]) -> Iterator[bytes]:
    """A WARC file as a crawler writes it: also requests, pictures and pages that were not found."""
    yield warcinfo(f"warc-{number:05d}.warc.gz")
    for page in pages:
        if rng.random() < 0.1:
            yield request(page.url)
        yield _page_record(rng, page)
        if rng.random() < 0.02:
            picture = b"\x89PNG\r\n\x1a\n" + rng.randbytes(64)
            yield response(f"{page.url}#picture", picture, content_type="image/png")
        if rng.random() < 0.02:
            gone = b"<html><body><h1>404 Not Found</h1></body></html>"
            lost = f"{page.url}#gone"
            yield response(lost, gone, content_type="text/html", status="404 Not Found")


def _page_record(rng: random.Random, page: Page) -> bytes:
    host = page.url.split("/")[2]
    charset, header, meta = _charset(rng, page.language)
    html = render_html(
        rng,
        host,
        _layout_of(host),
        page.language,
        page.title,
        page.paragraphs,
        markup=page.markup,
        charset=charset if meta else None,
    )
    payload = html.encode(charset)
    content_type = f"text/html; charset={charset}" if header else "text/html"
    return response(page.url, payload, content_type=content_type)


def _charset(rng: random.Random, language: str) -> tuple[str, bool, bool]:
    """(encoding, named in the HTTP header, named in a meta element); one of the two is always there."""
    draw = rng.random()
    charset = "gb18030" if language == "zh" and draw < 0.12 else "utf-8"
    match rng.randrange(3):
        case 0:
            return charset, True, True
        case 1:
            return charset, True, False
        case _:
            return charset, False, True
