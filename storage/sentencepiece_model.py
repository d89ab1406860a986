"""Reads a SentencePiece `.model` and says it in the words of `tokenizers`, ids unchanged.

The file is one protobuf message (sentencepiece_model.proto); the few fields that decide the ids are
read here, so that neither protobuf nor sentencepiece is needed.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Kinds of pieces, by their numbers in the file; there are also unused ones (5) and bytes (6)."""
UNIGRAM, BPE = 1, 2
"""Kinds of models, by their numbers in the file."""
SPACE = "\u2581"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePiece:
    """What of a model decides the ids."""

    pieces: tuple[Piece, ...]
    algorithm: int
    has_byte_fallback: bool
    character_map: bytes
    """SentencePiece's compiled normalisation, empty for none."""
    adds_space: bool
    """Whether a text is read as if a space stood before it."""
    removes_spaces: bool
    """Whether runs of spaces become one, and those at the ends none; such text does not come back."""


def parse(content: bytes) -> SentencePiece:
    """The model in a file's bytes. Raises ValueError if they are none, or of a kind without pieces."""
    try:
        fields = list(_fields(content))
        pieces = tuple(_piece(value) for number, value in fields if number == 1)
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normaliser = dict(_fields(next(value for number, value in fields if number == 3)))
    except (IndexError, StopIteration, struct.error, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            "the file is no SentencePiece model; give tokenizer.adopt a `.model` file as "
            "SentencePiece wrote it"
        ) from error
    algorithm = trainer.get(3, UNIGRAM)
    if algorithm not in (UNIGRAM, BPE) or not pieces:
        raise ValueError(
            f"SentencePiece models of kind {algorithm} (words or characters) cannot be adopted; "
            "use one of kind unigram or bpe"
        )
    if trainer.get(24, 0):
        raise ValueError(
            "the SentencePiece model puts spaces behind words, which cannot be adopted; train it "
            "without treat_whitespace_as_suffix"
        )
    model = SentencePiece(
        pieces=pieces,
        algorithm=algorithm,
        has_byte_fallback=bool(trainer.get(35, 0)),
        character_map=normaliser.get(2, b""),
        adds_space=bool(normaliser.get(3, 1)),
        removes_spaces=bool(normaliser.get(4, 1)),
    )
    _refuse_inexact(model)
    return model


def _refuse_inexact(model: SentencePiece) -> None:
    changes_spaces = model.adds_space or model.removes_spaces
    asked = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    if model.algorithm == BPE and asked and changes_spaces:
        raise ValueError(
            f"the SentencePiece model has symbols of its user ({asked[0]!r}, ...) and changes spaces, "
            "which would give other ids around them; train it with add_dummy_prefix=false and "
            "remove_extra_whitespaces=false, or adopt its tokenizer.json"
        )


def converted(model: SentencePiece) -> "tokenizers.Tokenizer":
    """The same ids from `tokenizers`: the whole text is one word, as it is for SentencePiece.

    Equal but for near ties of a unigram model, whose scores SentencePiece adds up in float32, and for
    pieces of BPE with a character that is no piece itself, which `tokenizers` cannot merge: they are
    among `ChatTokenizer.unreachable` (51 of ChatGLM's 64,789, such as `ür`), their text gets bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    made = Tokenizer(_bpe(model) if model.algorithm == BPE else _unigram(model))
    steps: list[Any] = []
    if model.character_map:
        steps.append(normalizers.Precompiled(model.character_map))
    if model.removes_spaces:
        # Not `Strip`, which takes line breaks too.
        steps += [_replaced("^ +| +$", ""), _replaced(" {2,}", " ")]
    if model.adds_space:
        steps.append(normalizers.Prepend(" "))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.adds_space:
        decoding.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Sequence(decoding)
    special = [p.text for p in model.pieces if p.kind in (CONTROL, UNKNOWN)]
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    if model.algorithm == BPE:
        asked = [p.text for p in model.pieces if p.kind == USER_DEFINED]
        made.add_tokens([AddedToken(text, normalized=False) for text in asked])
    return made


def _bpe(model: SentencePiece) -> Any:
    """Merges are not in the file: every way to put a piece together from two others, best piece first.

    Source: SentencePiece's bpe_model.cc, which merges the pair whose piece has the highest score.
    """
    from tokenizers import models

    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    usable = {piece.text for piece in model.pieces if piece.kind in (NORMAL, USER_DEFINED)}
    merges: list[tuple[float, int, str, str]] = []
    for piece in model.pieces:
        if piece.kind != NORMAL:
            continue
        for place in range(1, len(piece.text)):
            left, right = piece.text[:place], piece.text[place:]
            if left in usable and right in usable:
                merges.append((-piece.score, ids[piece.text], left, right))
    merges.sort(key=lambda merge: merge[:2])
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for _, _, left, right in merges],
        unk_token=_unknown(model),
        fuse_unk=True,
        byte_fallback=model.has_byte_fallback,
    )


def _unigram(model: SentencePiece) -> Any:
    """Source: SentencePiece's unigram_model.cc, which scores what a user defined so that it is always
    taken. Pieces that text must not give get the worst score there is; the score of an unknown
    character goes by that."""
    from tokenizers import models

    normal = [piece.score for piece in model.pieces if piece.kind == NORMAL] or [0.0]
    worst, best = min(normal), max(normal)

    def score(piece: Piece) -> float:
        if piece.kind == USER_DEFINED:
            return len(piece.text.encode("utf-8")) * best - 0.1
        return piece.score if piece.kind == NORMAL else worst

    vocabulary = [(piece.text, score(piece)) for piece in model.pieces]
    unknown = next((i for i, p in enumerate(model.pieces) if p.kind == UNKNOWN), None)
    return models.Unigram(vocabulary, unknown, model.has_byte_fallback)


def _unknown(model: SentencePiece) -> str | None:
    return next((piece.text for piece in model.pieces if piece.kind == UNKNOWN), None)


def _replaced(pattern: str, by: str) -> Any:
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(pattern), by)


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode("utf-8"), score, fields.get(3, NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message: an int, or bytes."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        number, wire = key >> 3, key & 7
        match wire:
            case 0:  # a number
                value, place = _varint(content, place)
            case 2:  # so many bytes
                size, place = _varint(content, place)
                value, place = content[place : place + size], place + size
            case 1 | 5:  # 64 or 32 bits
                size = 8 if wire == 1 else 4
                value, place = content[place : place + size], place + size
            case _:
                raise TypeError(f"wire type {wire} is not of protobuf 2")
        if place > len(content):
            raise IndexError("the message is cut short")
        yield number, value


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
