"""Settings of filter: which documents are worth keeping, and the thresholds with their sources."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from conf.settings import RUNTIME, Settings, SourceSpec


class Rule(Settings):
    """One rule: a document is dropped when its statistic lies outside the bounds."""

    name: str
    """Name in reasons and figures."""
    statistic: str
    """Column that the bounds are for."""
    minimum: float | None = None
    """Least value that is kept."""
    maximum: float | None = None
    """Greatest value that is kept."""
    languages: tuple[str, ...] = ()
    """Languages that the rule is for; empty: all."""
    needs: dict[str, float] = Field(default_factory=dict[str, float])
    """Statistic -> least value for the rule to be evaluated at all."""
    source: Annotated[str, RUNTIME] = ""
    """Where the bounds come from."""


class Bounds(Settings):
    """Other bounds for a rule of the preset."""

    minimum: float | None = None
    """Least value that is kept; none: no lower bound."""
    maximum: float | None = None
    """Greatest value that is kept; none: no upper bound."""


GOPHER = "Gopher, Rae et al. 2021, appendix A"
FINEWEB = "FineWeb, Penedo et al. 2024"
FINEWEB2 = "FineWeb2, Penedo et al. 2025, cmn_Hani"
MAP_NEO = "MAP-Neo, Zhang et al. 2024, Chinese rules"
C4 = "C4, Raffel et al. 2020"
C4_CODE = C4 + ", released code"
FINEWEB_CODE = FINEWEB + ", released code"
OWN = "ours, set on the texts named in the commit that changed it"

EN = ("en",)
ZH = ("zh",)
# Shares say little about a handful of words; papers count on pages of 50 words and more.
SENTENCE = {"words": 10.0}
PASSAGE = {"words": 20.0}
PAGE = {"words": 50.0}
# The subject of a text of 80 words is in a fifth of them without any fault.
REPORT = {"words": 100.0}
LONG = {"words": 200.0}
# Lines are paragraphs on web pages; in hard-wrapped text they say nothing.
UNWRAPPED = {"is_unwrapped": 1.0}
HAN = {"han": 20.0}


def _of(name: str, statistic: str, source: str, **fields: Any) -> Rule:
    return Rule(name=name, statistic=statistic, source=source, **fields)


def _grams(
    languages: tuple[str, ...],
    source: str,
    top: tuple[float, ...],
    repeated: tuple[float, ...],
) -> tuple[Rule, ...]:
    tops = tuple(
        _of(f"top_{n}gram", f"top_{n}gram_share", source,
            maximum=bound, languages=languages, needs=REPORT)
        for n, bound in zip((2, 3, 4), top, strict=True)
    )  # fmt: skip
    return tops + tuple(
        _of(f"repeated_{n}grams", f"repeated_{n}gram_share", source,
            maximum=bound, languages=languages, needs=PASSAGE)
        for n, bound in zip(range(5, 11), repeated, strict=True)
    )  # fmt: skip


ANY_LANGUAGE = (
    # Gopher's 100,000 words are for web pages; books go beyond.
    _of("too_long", "words", OWN, maximum=1_000_000),
    _of("letters", "letter_share", OWN, minimum=0.4),
    _of("odd_characters", "odd_share", OWN, maximum=0.005),
    _of("mojibake", "supplement_share", OWN, maximum=0.12),
    _of("rare_han", "rare_han_share", OWN, maximum=0.15, languages=ZH, needs=HAN),
    _of("signs", "sign_share", OWN, maximum=0.2, needs=SENTENCE),
    _of("digits", "digit_share", MAP_NEO, maximum=0.3, needs=SENTENCE),
    _of("symbols", "symbols_per_word", GOPHER, maximum=0.1, needs=SENTENCE),
    _of("bullets", "bullet_line_share", GOPHER, maximum=0.9, needs={"lines": 3.0}),
    _of("ellipses", "ellipsis_line_share", GOPHER, maximum=0.3, needs={"lines": 3.0}),
    _of("braces", "brace_share", C4 + " (any brace; here a share, for text about code)", maximum=0.025),
    _of("lorem_ipsum", "lorem_ipsum", C4, maximum=0),
    _of("policy_lines", "policy_line_share", C4 + " (per line; here a share)", maximum=0.5),
    _of("unique_words", "unique_word_share", MAP_NEO + ", on the first 1,000 words",
        minimum=0.1, needs=LONG),
    _of("entropy", "entropy", MAP_NEO + ", nats, on the first 1,000 words", minimum=3, needs=LONG),
)  # fmt: skip

ENGLISH = (
    _of("word_length", "mean_word_chars", GOPHER, minimum=3, maximum=10, languages=EN, needs=SENTENCE),
    _of("letter_words", "letter_word_share", GOPHER, minimum=0.8, languages=EN, needs=SENTENCE),
    _of("stop_words", "stop_words", GOPHER, minimum=2, languages=EN, needs=PAGE),
    _of("any_stop_word", "stop_words", OWN, minimum=1, languages=EN, needs=SENTENCE),
    _of("ended_lines", "ended_line_share", FINEWEB, minimum=0.12, languages=EN, needs=UNWRAPPED),
    _of("short_lines", "short_line_share", FINEWEB, maximum=0.67, languages=EN,
        needs=UNWRAPPED | {"lines": 3.0}),
    _of("new_lines", "newlines_per_word", FINEWEB, maximum=0.3, languages=EN,
        needs=UNWRAPPED | SENTENCE),
    _of("repeated_lines", "repeated_line_share", GOPHER, maximum=0.3, languages=EN,
        needs={"lines": 3.0}),
    _of("repeated_line_chars", "repeated_line_char_share", GOPHER, maximum=0.2, languages=EN,
        needs={"lines": 3.0}),
    *_grams(EN, GOPHER, (0.20, 0.18, 0.16), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)),
)  # fmt: skip

CHINESE = (
    _of("word_length", "mean_word_chars", FINEWEB2, maximum=5, languages=ZH, needs=SENTENCE),
    _of("letter_words", "letter_word_share", OWN + "; FineWeb2 has 0.735", minimum=0.265,
        languages=ZH, needs=SENTENCE),
    _of("stop_words", "stop_words", OWN + "; Gopher's rule on function characters",
        minimum=2, languages=ZH, needs=PAGE),
    _of("any_stop_word", "stop_words", OWN, minimum=1, languages=ZH, needs=PASSAGE),
    _of("ended_lines", "ended_line_share", FINEWEB2, minimum=0.106, languages=ZH, needs=UNWRAPPED),
    _of("new_lines", "newlines_per_word", FINEWEB2, maximum=0.178, languages=ZH,
        needs=UNWRAPPED | SENTENCE),
    _of("repeated_lines", "repeated_line_share", FINEWEB2, maximum=0.287, languages=ZH,
        needs={"lines": 3.0}),
    *_grams(ZH, FINEWEB2 + "; a word is 1.6 characters",
            (0.256, 0.201, 0.171), (0.198, 0.182, 0.167, 0.154, 0.140, 0.127)),
)  # fmt: skip

# Rules as published: for every text of the language, however short.


def _published(
    source: str, prefix: str, languages: tuple[str, ...], *rules: Rule
) -> tuple[Rule, ...]:
    return tuple(
        rule.model_copy(
            update={"name": f"{prefix}_{rule.name}", "languages": languages, "needs": {},
                    "source": rule.source or source}
        )
        for rule in rules
    )  # fmt: skip


C4_RULES = _published(C4_CODE, "c4", EN,
    _of("sentences", "sentences", "", minimum=3),
    _of("braces", "braces", "", maximum=0),
    _of("lorem_ipsum", "lorem_ipsum", "", maximum=0),
)  # fmt: skip

GOPHER_RULES = _published(GOPHER, "gopher", EN,
    _of("words", "words", "", minimum=50, maximum=100_000),
    _of("word_length", "mean_word_chars", "", minimum=3, maximum=10),
    _of("symbols", "symbols_per_word", "", maximum=0.1),
    _of("bullets", "bullet_line_share", "", maximum=0.9),
    _of("ellipses", "ellipsis_line_share", "", maximum=0.3),
    _of("letter_words", "letter_word_share", "", minimum=0.8),
    _of("stop_words", "gopher_stop_words", "", minimum=2),
    _of("repeated_lines", "repeated_line_share", "", maximum=0.3),
    _of("repeated_line_chars", "repeated_line_char_share", "", maximum=0.2),
    _of("repeated_paragraphs", "repeated_paragraph_share", "", maximum=0.3),
    _of("repeated_paragraph_chars", "repeated_paragraph_char_share", "", maximum=0.2),
    *_grams(EN, "", (0.20, 0.18, 0.16), (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)),
)  # fmt: skip

FINEWEB_RULES = _published(FINEWEB_CODE, "fineweb", EN,
    _of("ended_lines", "ended_line_share", "", minimum=0.12),
    _of("short_lines", "short_line_share", "", maximum=0.67),
    _of("repeated_line_chars", "repeated_line_char_share", "", maximum=0.01),
    _of("new_lines", "newlines_per_word", "", maximum=0.3),
)  # fmt: skip

FINEWEB2_RULES = _published(FINEWEB2, "fineweb2", ZH,
    _of("words", "words", "Gopher's 50 and 100,000; " + FINEWEB2 + "; a word is 1.6 characters",
        minimum=80, maximum=160_000),
    _of("word_length", "mean_word_chars", "", minimum=1, maximum=5),
    _of("letter_words", "letter_word_share", "", minimum=0.735),
    _of("stop_words", "fineweb2_stop_words", "", minimum=2),
    _of("ended_lines", "ended_line_share", "", minimum=0.106),
    _of("new_lines", "newlines_per_word", "", maximum=0.178),
    _of("repeated_lines", "repeated_line_share", "", maximum=0.287),
    *_grams(ZH, FINEWEB2 + "; a word is 1.6 characters",
            (0.256, 0.201, 0.171), (0.198, 0.182, 0.167, 0.154, 0.140, 0.127)),
)  # fmt: skip

# Its mean word length (1.3 to 10) needs a segmenter and is left out.
MAP_NEO_RULES = _published(MAP_NEO, "map_neo", ZH,
    _of("sentences", "sentences", "", minimum=2),
    _of("chars", "chars", "", minimum=50, maximum=10_000),
    _of("hashes", "hashes_per_char", "", maximum=0.1),
    _of("ellipses", "ellipses_per_char", "", maximum=0.1),
    _of("brackets", "bracketed_share", "", maximum=0.1),
    _of("digits", "digit_share", "", maximum=0.3),
    _of("more_lines", "more_line_share", "", maximum=0.3),
    _of("bullets", "bullet_line_share", "", maximum=0.9),
    _of("punctuation", "punctuation", "", minimum=1),
    _of("unique_words", "unique_word_share", MAP_NEO + ", on the first 1,000 words", minimum=0.1),
    _of("entropy", "entropy", MAP_NEO + ", nats, on the first 1,000 words", minimum=3),
    *_grams(ZH, MAP_NEO + "; a word is 1.6 characters", (0.20, 0.18, 0.16), (0.60,) * 6),
)  # fmt: skip

EN_PUBLISHED = C4_RULES + GOPHER_RULES + FINEWEB_RULES
ZH_PUBLISHED = FINEWEB2_RULES + MAP_NEO_RULES

PRESETS: dict[str, tuple[Rule, ...]] = {
    "zh_en": ANY_LANGUAGE + ENGLISH + CHINESE,
    "en": ANY_LANGUAGE + ENGLISH,
    "zh": ANY_LANGUAGE + CHINESE,
    "zh_en_published": EN_PUBLISHED + ZH_PUBLISHED,
    "en_published": EN_PUBLISHED,
    "zh_published": ZH_PUBLISHED,
    "c4": C4_RULES,
    "gopher": GOPHER_RULES,
    "fineweb": FINEWEB_RULES,
    "fineweb2_zh": FINEWEB2_RULES,
    "map_neo_zh": MAP_NEO_RULES,
    "none": (),
}
Preset = Literal[
    "zh_en", "en", "zh", "zh_en_published", "en_published", "zh_published", "c4", "gopher", "fineweb",
    "fineweb2_zh", "map_neo_zh", "none",
]  # fmt: skip


LineRule = Literal[
    "citations", "long_word", "unended", "short", "javascript", "policy", "lorem_ipsum", "braces", "more",
]  # fmt: skip
C4_LINES: tuple[LineRule, ...] = (
    "citations", "long_word", "unended", "short", "javascript", "policy",
)  # fmt: skip


class FilterConfig(Settings):
    """Which documents are dropped."""

    preset: Preset = "zh_en"
    """Set of rules: those of C4, Gopher and FineWeb for English, of FineWeb2 and MAP-Neo for Chinese. A
    share is judged only in a text that is long enough for it; `.._published` and the sets of one paper
    apply every bound as published, and so drop most texts of a few sentences."""
    min_chars: Annotated[int, Field(ge=0)] = 15
    """Characters below which a document is `too_short`."""
    bounds: dict[str, Bounds] = Field(default_factory=dict[str, Bounds])
    """Rule -> other bounds, in every language that the rule is for."""
    off: tuple[str, ...] = ()
    """Rules of the preset that are not used."""
    more_rules: tuple[Rule, ...] = ()
    """Further rules, on any statistic."""
    outlier_sigmas: Annotated[float | None, Field(gt=0)] = 3.0
    """Distance from the middle log length of a language and source, in standard deviations (1.4826
    times the median absolute deviation, where robust), above which a document is an outlier; none: off."""
    outlier_spread: Literal["robust", "plain"] = "robust"
    """`robust`: median and median absolute deviation, which the outliers themselves do not move;
    `plain`: mean and standard deviation."""
    outlier_min_sigma: Annotated[float, Field(gt=0)] = 0.5
    """Least standard deviation assumed, so that texts of nearly equal lengths have no outliers for it."""
    outlier_min_documents: Annotated[int, Field(ge=2)] = 100
    """Documents of a language and source below which nothing is an outlier."""
    line_cuts: tuple[LineRule | Literal["c4"], ...] = ()
    """Lines that are cut from documents that stay: `unended` (without a mark of a sentence's end), `short`
    (under five words), `long_word` (above 1,000 letters), `javascript`, `policy`, and of `citations` the
    mark alone (`[1]`), as in C4's released code and with Chinese forms; `c4` is all of these. Also
    `lorem_ipsum` and `braces`, for which C4 drops the page, and `more` (MAP-Neo's lines that ask to read
    more). Rules judge the text before the cut; a second filter judges what is left."""
    bad_words: tuple[SourceSpec, ...] = ()
    """Lists of words, one a line; none by default."""
    max_bad_words: Annotated[int, Field(ge=0)] = 0
    """Bad words that a document may have."""
    good_texts: tuple[SourceSpec, ...] = ()
    """Samples of good text: an n-gram model of them gives every document its perplexity."""
    bad_texts: tuple[SourceSpec, ...] = ()
    """Samples of what is not wanted (spam, unsafe text): a linear classifier tells it from the good."""
    drop_perplexity: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each language's documents, those of the highest perplexity, that is `perplexity_tail`."""
    drop_quality: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each language's documents, those most like the bad texts, that is `low_quality`."""
    own_rules: tuple[SourceSpec, ...] = ()
    """Python files with `def drops(document) -> bool` each; their content is part of identity."""
    examples: Annotated[int, RUNTIME, Field(ge=0)] = 20
    """Dropped and borderline documents per rule that are kept for people."""

    @model_validator(mode="after")
    def _has_samples(self) -> Self:
        if (self.drop_perplexity or self.bad_texts) and not self.good_texts:
            raise ValueError(
                "perplexity and quality are measured against good text: give `good_texts`"
            )
        if self.drop_quality and not self.bad_texts:
            raise ValueError("a classifier needs two samples: give `bad_texts`, or drop_quality=0")
        return self

    def rules(self) -> tuple[Rule, ...]:
        """The rules in force, in the order in which a reason is looked for.

        Raises ValueError for the name of no rule.
        """
        preset = PRESETS[self.preset]
        names = {rule.name for rule in preset}
        if unknown := {*self.bounds, *self.off} - names:
            raise ValueError(
                f"filter: no rule {', '.join(sorted(unknown))} in preset {self.preset}; "
                f"known: {', '.join(sorted(names))}"
            )
        short = Rule(name="too_short", statistic="chars", minimum=self.min_chars)
        chosen = tuple(
            rule.model_copy(update=self.bounds[rule.name].model_dump())
            if rule.name in self.bounds
            else rule
            for rule in preset
            if rule.name not in self.off
        )
        bad = Rule(name="bad_words", statistic="bad_words", maximum=self.max_bad_words)
        return (short, *chosen, *self.more_rules, *((bad,) if self.bad_words else ()))

    def line_rules(self) -> tuple[LineRule, ...]:
        """The rules by which lines are cut, once each."""
        rules: list[LineRule] = []
        for name in self.line_cuts:
            rules += C4_LINES if name == "c4" else (name,)
        return tuple(dict.fromkeys(rules))

    def identity(self) -> dict[str, Any]:
        """With the rules in force, so that a changed preset is another computation."""
        return super().identity() | {"rules": [rule.identity() for rule in self.rules()]}
