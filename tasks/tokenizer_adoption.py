"""Tokenizers that others made: read from their files, ids unchanged, with our special tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from storage.source import COMPRESSIONS, SourceFile
from storage.tokenizer import CONFIG_FILE, MODEL_FILE, SPECIAL_TOKENS, Pretokenizer
from tasks.rows import open_text
from tasks.tokenizer_training import text_splitter

if TYPE_CHECKING:
    import tokenizers

USUAL_SPELLINGS = {
    "pad": ("<|pad|>", "<pad>", "[PAD]", "<|padding|>"),
    "eos": ("<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"),
}
"""How others spell these two; of several the first that is there."""
BYTE_START = "<(?=0x[0-9A-F]{2}>)"
"""First sign of a text that spells a byte as SentencePiece does."""


@dataclass(frozen=True)
class Adopted:
    """A tokenizer that others made, with all of our special tokens."""

    model: "tokenizers.Tokenizer"
    spelling: Mapping[str, str]
    """How it writes each of our special tokens."""
    pretokenizer: Pretokenizer


def adopted(
    files: Sequence[SourceFile], given: Mapping[Any, str] | None = None, further: Sequence[str] = ()
) -> Adopted:
    """The tokenizer in some files; what it lacks of the special tokens gets ids behind its own.

    `given` says how it spells some of our special tokens, `further` are special tokens to add. Raises
    ValueError for files that are no tokenizer, and for one that gives special ids for text.
    """
    from tokenizers import AddedToken

    # Of two files with one name the one that lies higher, last.
    ordered = sorted(files, key=lambda file: -file.name.count("/"))
    paths = {_plain_name(file.path): file.path for file in ordered}
    model = _read(paths)
    spelling = _spelling(model, paths, given or {})
    asked = [spelling[name] for name in SPECIAL_TOKENS] + list(further)
    model.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in asked])
    model = _guarded(model)
    # What would cut or fill up a text, or put tokens around it.
    model.no_truncation()
    model.no_padding()
    model.post_processor = None
    _refuse_unsafe(model, spelling, str(files[0].path))
    return Adopted(model, spelling, _pretokenizer(model))


def _read(paths: Mapping[str, Path]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models

    documents = [path for name, path in paths.items() if name.endswith(MODEL_FILE)]
    pieces = [path for name, path in paths.items() if name.endswith(".model")]
    if len(documents) == 1:
        return Tokenizer.from_str(_content(documents[0]).decode("utf-8"))
    if {"vocab.json", "merges.txt"} <= paths.keys():
        vocabulary = json.loads(_content(paths["vocab.json"]))
        lines = _content(paths["merges.txt"]).decode("utf-8").split("\n")
        pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
        # Neither the first line, a comment, nor what some copies of GPT-2 merge into no token.
        merges = [pair for pair in pairs if pair[1] and "".join(pair) in vocabulary]
        model = Tokenizer(models.BPE(vocabulary, merges))
        model.pre_tokenizer, model.decoder = text_splitter("gpt-2"), decoders.ByteLevel()
        return model
    if len(pieces) == 1:
        from storage.sentencepiece_model import converted, parse

        return converted(parse(_content(pieces[0])))
    raise ValueError(
        f"{', '.join(sorted(paths))}: neither one tokenizer.json, nor vocab.json with merges.txt, nor "
        "one SentencePiece .model; name the file or the folder of one tokenizer (one that only its own "
        "program reads becomes a tokenizer.json by `AutoTokenizer.from_pretrained(..).save_pretrained`)"
    )


def _plain_name(path: Path) -> str:
    return path.stem if path.suffix.removeprefix(".") in COMPRESSIONS else path.name


def _content(path: Path) -> bytes:
    with open_text(path) as stream:
        return stream.read()


def _spelling(
    model: "tokenizers.Tokenizer", paths: Mapping[str, Path], given: Mapping[Any, str]
) -> dict[str, str]:
    """How our special tokens are written: as given, as the tokenizer's own configuration says, by the
    usual names, or as we do."""
    told: dict[str, Any] = {}
    if CONFIG_FILE in paths:
        told = json.loads(_content(paths[CONFIG_FILE]))
    spelling = dict(SPECIAL_TOKENS)
    for name in ("eos", "pad"):
        own = told.get(f"{name}_token")
        own = cast("dict[str, str]", own)["content"] if isinstance(own, dict) else own
        taken: set[Any] = {*spelling.values()} - {SPECIAL_TOKENS[name]}
        if name == "pad":
            taken.add(told.get("unk_token"))  # which text may give
        known = [
            text
            for text in (own, *USUAL_SPELLINGS[name])
            if text and text not in taken and model.token_to_id(text) is not None
        ]
        spelling[name] = given.get(name) or next(iter(known), SPECIAL_TOKENS[name])
    return spelling


def _guarded(model: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """Unigram takes any piece that a text spells, a special one too: such text is cut behind its first
    sign, so that the piece is never seen whole."""
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    content = json.loads(model.to_str())
    if content["model"]["type"] != "Unigram":
        return model
    special = [token["content"] for token in content["added_tokens"] if token["special"]]
    spelled = [f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in special]
    guarded = Tokenizer.from_str(json.dumps(content))
    cut = pre_tokenizers.Split(Regex("|".join([*spelled, BYTE_START])), "isolated")
    before = guarded.pre_tokenizer
    guarded.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([cut, before])
    return guarded


def _refuse_unsafe(model: "tokenizers.Tokenizer", spelling: Mapping[str, str], where: str) -> None:
    """Raise ValueError where two tokens share an id, or text gives a special one."""
    vocabulary = model.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError(
            f"{where}: {len(vocabulary)} tokens have {len(set(vocabulary.values()))} different ids; its "
            "ids have gaps where new special tokens would go, so it cannot be adopted"
        )
    model.encode_special_tokens = True
    special = {vocabulary[text] for text in spelling.values()}
    for text in spelling.values():
        if special & set(model.encode(text, add_special_tokens=False).ids):
            raise ValueError(
                f"{where}: the text {text!r} gives a special id, so that any document could end or begin "
                "messages; adopt another tokenizer, or name other tokens with adopted_special"
            )


def _pretokenizer(model: "tokenizers.Tokenizer") -> Pretokenizer:
    """Name of the pattern by which byte-level BPE cuts text, where it is one that llama.cpp knows."""
    content = json.loads(model.to_str())
    if content["model"]["type"] != "BPE" or content["normalizer"] is not None:
        return "other"
    for name in ("gpt-2", "qwen2"):
        if _without_offsets(content["pre_tokenizer"]) == _form(name):
            return name
    return "other"


def _form(name: Pretokenizer) -> Any:
    from tokenizers import Tokenizer, models

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = text_splitter(name)
    return _without_offsets(json.loads(model.to_str())["pre_tokenizer"])


def _without_offsets(form: Any) -> Any:
    """Without a key that changes where tokens are said to lie, and no ids."""
    match form:
        case dict():
            items = cast("dict[str, Any]", form).items()
            return {k: _without_offsets(v) for k, v in items if k != "trim_offsets"}
        case list():
            return [_without_offsets(item) for item in cast("list[Any]", form)]
        case _:
            return form
