"""The tokenizer artifact, and how text and conversations become token ids and back.

`files/tokenizer.json` is the `tokenizers` format, `files/tokenizer.meta.json` says what it is; these
two are what every other artifact carries a copy of. `tokenizer_config.json` lets transformers load the
folder unchanged; `vocab.json` and `merges.txt` (BPE), `vocab.txt` (WordPiece) or `unigram.json` are the
older forms of the same model. Importing this needs only `tokenizers` and pydantic.
"""

import functools
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

import tokenizers
from pydantic import BaseModel, ConfigDict

from storage.artifact import Artifact

MODEL_FILE = "tokenizer.json"
META_FILE = "tokenizer.meta.json"
CONFIG_FILE = "tokenizer_config.json"
NO_LIMIT = 10**30
"""What transformers writes for a tokenizer without a longest input."""

SPECIAL_TOKENS = {
    "pad": "<|pad|>",
    "eos": "<|eos|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
}
"""Name -> spelling. A trained tokenizer has them first, in this order; one that was adopted where it
had them or behind all others, and may spell padding and the end of a document in its own way."""

Pretokenizer = Literal["gpt-2", "qwen2", "other"]
"""How text is cut before merging, by the name that llama.cpp has for the pattern."""
Algorithm = Literal["bpe", "wordpiece", "unigram"]

CONTINUES = "\u203f"
"""Before every piece of a WordPiece word but its first; a sign that no byte is spelled with."""
FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece spells a byte of a character that it has no piece for."""

ROLES = ("system", "user", "assistant")

# The content is trimmed because white space that meets the header's line break would be cut into
# other tokens than the content alone, and ids would differ between this text form and `render`.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim) + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""Jinja form of `ChatTokenizer.render`, for exports: the same ids, but for content that spells out
special tokens, which only `render` keeps as text."""


class TokenizerMeta(BaseModel):
    """What a tokenizer is, without loading it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocabulary: int
    special: dict[str, int]
    digest: str
    """sha256 of `tokenizer.json`; token files and checkpoints name it."""
    pretokenizer: Pretokenizer = "gpt-2"
    algorithm: Algorithm = "bpe"
    system: str = ""
    """What a conversation without a system message begins with; nothing where it is empty."""


LONGEST_SPACE = 9_000_000
"""White spaces on end; from ten million on, a regular expression of `tokenizers` gives up and with it
the process."""


def _byte_of_sign() -> dict[str, int]:
    """GPT-2's byte alphabet, in which tokenizer.json spells tokens: printable bytes stand for
    themselves, the others are counted from U+0100 (Radford et al. 2019)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in sorted(printable)} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


BYTE_OF_SIGN = _byte_of_sign()
NEVER_BYTES = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that UTF-8 never has."""
NEVER_IN_UTF8 = {sign for sign, byte in BYTE_OF_SIGN.items() if byte in NEVER_BYTES}


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids; both lists have the same length."""

    ids: list[int]
    is_answer: list[bool]
    """Whether the assistant has to produce the token: its content and the `<|im_end|>` after it."""


class ChatTokenizer:
    """Encodes text and ChatML conversations. No text, whatever it spells, yields a special id."""

    def __init__(self, folder: Path) -> None:
        """Load from a folder with both files.

        Raises FileNotFoundError, and ValueError if `tokenizer.json` is not the one the meta file names.
        """
        path = folder / MODEL_FILE
        self.meta = read_meta(folder)
        content = path.read_bytes()
        if (digest := hashlib.sha256(content).hexdigest()) != self.meta.digest:
            raise ValueError(
                f"{path} has digest {digest[:12]}, {META_FILE} says {self.meta.digest[:12]}; "
                "the two files are not of one tokenizer: copy both from the same artifact"
            )
        self._model = tokenizers.Tokenizer.from_buffer(content)
        self._model.encode_special_tokens = True  # their spelling in text stays text

    @property
    def vocabulary(self) -> int:
        """Number of ids, special ones included."""
        return self.meta.vocabulary

    @property
    def digest(self) -> str:
        """sha256 of `tokenizer.json`."""
        return self.meta.digest

    @property
    def pad(self) -> int:
        """Id that fills up batches; never learnt, never counted."""
        return self.meta.special["pad"]

    @property
    def eos(self) -> int:
        """Id that ends every document of a corpus."""
        return self.meta.special["eos"]

    @property
    def im_start(self) -> int:
        """Id that starts a message."""
        return self.meta.special["im_start"]

    @property
    def im_end(self) -> int:
        """Id that ends a message, and with it an answer."""
        return self.meta.special["im_end"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special one."""
        parts = (self._model.encode(part, add_special_tokens=False) for part in _readable(text))
        return [token for part in parts for token in part.ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each as `encode` gives them."""
        if any(len(text) > LONGEST_SPACE for text in texts):
            return [self.encode(text) for text in texts]
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 (a character cut in half) become U+FFFD."""
        return self._model.decode(list(ids), skip_special_tokens=not keep_special)

    def shown(self, token: int) -> str:
        """The text of one ordinary token; bytes that are only a part of a character as `‹E5 B0›`.

        Raises ValueError for an id that is none.
        """
        piece = self._model.id_to_token(token)
        if piece is None:
            raise ValueError(f"there is no token {token}; ids are below {self.vocabulary}")
        text = self.decode([token])
        if "\ufffd" not in text:
            return text
        if fallback := FALLBACK_BYTE.fullmatch(piece):
            return f"‹{fallback[1]}›"
        signs = piece.removeprefix(CONTINUES)
        if not BYTE_OF_SIGN.keys() >= set(signs):
            return text
        return f"‹{bytes(BYTE_OF_SIGN[sign] for sign in signs).hex(' ').upper()}›"

    def unreachable(self) -> list[int]:
        """Ordinary ids that no text gives: the model reads their own spelling as other tokens, or it
        holds bytes that UTF-8 never has."""
        special = {*self.meta.special.values(), *self._model.get_added_tokens_decoder()}
        return [
            token
            for token in range(self.vocabulary)
            if token not in special
            and self._model.id_to_token(token) is not None
            and not self._is_reachable(token)
        ]

    def _is_reachable(self, token: int) -> bool:
        piece = self._model.id_to_token(token) or ""
        if set(piece) & NEVER_IN_UTF8:
            return False
        if fallback := FALLBACK_BYTE.fullmatch(piece):
            return int(fallback[1], 16) not in NEVER_BYTES
        prefix = getattr(self._model.model, "continuing_subword_prefix", None)
        if prefix and piece.startswith(prefix):
            return True  # read behind another piece, whatever that is
        text = self.decode([token])
        if "\ufffd" in text:  # a part of a character, which no text is
            return [made.id for made in self._model.model.tokenize(piece)] == [token]
        return any(token in self.encode(before + text) for before in ("", "\n"))

    def render(
        self, messages: Sequence[Mapping[str, str]], *, for_generation: bool = False
    ) -> Rendered:
        """A conversation in ChatML, with the mask of what the assistant says.

        Built from token pieces, so the mask cannot be forged by what a message spells. Content is
        stripped of outer white space. `for_generation` adds the header of the assistant's next message.
        The tokenizer's system prompt, where it has one, begins a conversation without its own.
        Raises ValueError for an unknown role.
        """
        ids: list[int] = []
        is_answer: list[bool] = []
        if self.meta.system and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.meta.system}, *messages]
        for message in messages:
            header = self._header(message["role"])
            content = [*self.encode_content(message["content"], message["role"]), self.im_end]
            ids += [*header, *content, *self._line_break]
            is_answer += [False] * len(header)
            is_answer += [message["role"] == "assistant"] * len(content)
            is_answer += [False] * len(self._line_break)
        if for_generation:
            header = self._header("assistant")
            ids += header
            is_answer += [False] * len(header)
        return Rendered(ids, is_answer)

    def encode_content(self, text: str, role: str = "assistant") -> list[int]:
        """Ids of a message's content, stripped of outer white space, as it stands behind its header.

        A tokenizer that puts a space before every text (SentencePiece's) puts none there.
        """
        before = self._header(role)[1:]
        ids = self.encode(f"{role}\n{text.strip()}")
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text.strip())

    def _header(self, role: str) -> list[int]:
        if role not in ROLES:
            raise ValueError(f"a message has role {role!r}; use one of {', '.join(ROLES)}")
        return self._headers[role]

    @functools.cached_property
    def _headers(self) -> dict[str, list[int]]:
        return {role: [self.im_start, *self.encode(f"{role}\n")] for role in ROLES}

    @functools.cached_property
    def _line_break(self) -> list[int]:
        return self.encode("\n")


@dataclass(frozen=True)
class Tokenizer(Artifact):
    """A trained tokenizer: `tokenizer.json`, `tokenizer.meta.json`."""

    kind: ClassVar[str] = "tokenizer"

    @functools.cached_property
    def meta(self) -> TokenizerMeta:
        """What it is, without loading it."""
        return read_meta(self.files)

    @functools.cached_property
    def chat(self) -> ChatTokenizer:
        """The tokenizer, loaded."""
        return ChatTokenizer(self.files)


def _readable(text: str) -> list[str]:
    """The text, cut where white space goes on for longer than `tokenizers` can read."""
    if len(text) <= LONGEST_SPACE:
        return [text]
    cuts = [found.end() for found in re.finditer(rf"\s{{{LONGEST_SPACE}}}", text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def read_meta(folder: Path) -> TokenizerMeta:
    """What the tokenizer in a folder is. Raises FileNotFoundError."""
    return TokenizerMeta.model_validate_json((folder / META_FILE).read_text("utf-8"))


def write_tokenizer(
    folder: Path,
    model: tokenizers.Tokenizer,
    pretokenizer: Pretokenizer,
    *,
    spelling: Mapping[str, str] = SPECIAL_TOKENS,
    system: str = "",
) -> TokenizerMeta:
    """Write a tokenizer, what it is, and the files that transformers looks for.

    Raises ValueError if one of the special tokens has no id of its own.
    """
    special = {name: model.token_to_id(spelling[name]) for name in SPECIAL_TOKENS}
    found = {name: token for name, token in special.items() if token is not None}
    if len(set(found.values())) < len(SPECIAL_TOKENS):
        raise ValueError(f"special tokens have ids {special}, each must have one of its own")
    folder.mkdir(parents=True, exist_ok=True)
    content = model.to_str(pretty=False).encode("utf-8")
    (folder / MODEL_FILE).write_bytes(content)
    meta = TokenizerMeta(
        vocabulary=max(model.get_vocab(with_added_tokens=True).values()) + 1,
        special=found,
        digest=hashlib.sha256(content).hexdigest(),
        pretokenizer=pretokenizer,
        algorithm=_algorithm_of(content),
        system=system,
    )
    _write_meta(folder, meta)
    model.model.save(str(folder))
    config = json.dumps(tokenizer_config(folder), indent=2, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(config + "\n", "utf-8")
    return meta


def tokenizer_config(folder: Path, *, context: int = NO_LIMIT) -> dict[str, Any]:
    """`tokenizer_config.json` of the tokenizer in a folder, in a class that transformers 4 and 5 have.

    Special tokens are spelled as the tokenizer does, since one that was adopted keeps its own.
    """
    meta = read_meta(folder)
    added = json.loads((folder / MODEL_FILE).read_text("utf-8"))["added_tokens"]
    spelling = {token["id"]: token["content"] for token in added}
    spelled = {name: spelling[index] for name, index in meta.special.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": None,
        "eos_token": spelled["im_end"],
        "pad_token": spelled["pad"],
        "additional_special_tokens": [spelled["im_start"], spelled["eos"]],
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(meta.system),
    }


def chat_template(system: str = "") -> str:
    """`CHAT_TEMPLATE`, beginning with the system prompt where a conversation has none."""
    if not system:
        return CHAT_TEMPLATE
    prompt = json.dumps(system.strip(), ensure_ascii=False)
    return (
        "{%- if not messages or messages[0]['role'] != 'system' -%}"
        f"{{{{- '<|im_start|>system\\n' + {prompt} + '<|im_end|>\\n' -}}}}{{%- endif -%}}"
        + CHAT_TEMPLATE
    )


def _algorithm_of(content: bytes) -> Algorithm:
    kind = str(json.loads(content)["model"]["type"]).lower()
    if kind not in get_args(Algorithm):
        raise ValueError(
            f"the tokenizer's model is {kind}; one of {', '.join(get_args(Algorithm))} is expected"
        )
    return cast("Algorithm", kind)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy both files of a tokenizer into a folder, which is made."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_FILE, META_FILE):
        shutil.copyfile(source / name, target / name)


def _write_meta(folder: Path, meta: TokenizerMeta) -> None:
    (folder / META_FILE).write_text(meta.model_dump_json(indent=2) + "\n", "utf-8")
