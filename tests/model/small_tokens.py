"""A small bilingual corpus as token files and a tokenizer, made without any other stage."""

import random
from pathlib import Path

import numpy as np

from storage.tokenizer import ChatTokenizer
from storage.tokens import SplitCount, TokensMeta, bytes_path, end_path, token_path, write_meta
from tests.model.tiny import tiny_tokenizer

ENGLISH = ("The fox", "A river", "Our teacher", "The old clock", "Winter", "This small town")
ENGLISH_ENDS = (
    "sleeps in the shade.",
    "is blue and quiet.",
    "comes back every year.",
    "likes rice.",
)
CHINESE = ("狐狸", "这条河", "我们的老师", "旧时钟", "冬天", "这座小城")
CHINESE_ENDS = ("在树荫下睡觉。", "又蓝又安静。", "每年都会回来。", "喜欢吃米饭。")

Documents = dict[str, dict[str, list[str]]]
"""Domain -> split -> texts."""


def documents(count: int = 120, seed: int = 0) -> Documents:
    """`count` training and a quarter as many held-out documents in each of `zh` and `en`."""
    source = random.Random(seed)

    def text(starts: tuple[str, ...], ends: tuple[str, ...], gap: str) -> str:
        return gap.join(
            source.choice(starts) + gap + source.choice(ends) for _ in range(source.randint(2, 6))
        )

    return {
        "en": {
            "train": [text(ENGLISH, ENGLISH_ENDS, " ") for _ in range(count)],
            "held": [text(ENGLISH, ENGLISH_ENDS, " ") for _ in range(count // 4)],
        },
        "zh": {
            "train": [text(CHINESE, CHINESE_ENDS, "") for _ in range(count)],
            "held": [text(CHINESE, CHINESE_ENDS, "") for _ in range(count // 4)],
        },
    }


def write_small_tokens(folder: Path, texts: Documents | None = None) -> Path:
    """A tokens folder with the documents; returns it."""
    texts = documents() if texts is None else texts
    tokenizer = tiny_tokenizer(folder / "tokenizer")
    counts = {
        domain: {split: _write_split(folder, tokenizer, domain, split, splits[split])
                 for split in ("train", "held")}
        for domain, splits in texts.items()
    }  # fmt: skip
    meta = TokensMeta(
        eos=tokenizer.eos,
        vocabulary=tokenizer.vocabulary,
        tokenizer_digest=tokenizer.digest,
        domains=counts,  # type: ignore[arg-type]
    )
    write_meta(folder, meta)
    return folder


def _write_split(
    folder: Path, tokenizer: ChatTokenizer, domain: str, split: str, texts: list[str]
) -> SplitCount:
    rows = [[*tokenizer.encode(text), tokenizer.eos] for text in texts]
    sizes = [len(text.encode("utf-8")) for text in texts]
    ids = np.array([token for row in rows for token in row], "<u2")
    ids.tofile(token_path(folder, domain, split))  # type: ignore[arg-type]
    np.cumsum([len(row) for row in rows]).astype("<u8").tofile(
        end_path(folder, domain, split)  # type: ignore[arg-type]
    )
    if split == "held":
        np.array(sizes, "<u4").tofile(bytes_path(folder, domain))
    return SplitCount(tokens=len(ids), documents=len(texts), bytes=sum(sizes))
