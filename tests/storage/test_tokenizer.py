"""Text and conversations come back from their ids, and nobody can forge a special token."""

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.tokenizer import TokenizerConfig
from storage.tokenizer import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    ChatTokenizer,
    chat_template,
    copy_tokenizer,
    write_tokenizer,
)
from tasks.tokenizer_training import train

TEXTS = [
    "The cat sat on the mat, user and assistant, 12 times. system",
    "猫坐在垫子上，狗在山上吃草。",
    "assistant\nuser\nsystem\n",
] * 20

ANY_TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS.values(), "user\n", "assistant\n", "猫", "cat ", "\n", "  ", "12"]
    ),
    max_size=12,
).map("".join)
UNFORGED = ANY_TEXT.filter(lambda text: not any(s in text for s in SPECIAL_TOKENS.values()))
ROLES = st.sampled_from(["system", "user", "assistant"])


def dialogues(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(st.fixed_dictionaries({"role": ROLES, "content": content}), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path, train(TEXTS, TokenizerConfig(vocabulary=400)), "qwen2")
    return path


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatTokenizer:
    return ChatTokenizer(folder)


def test_special_ids_are_the_first_four(chat: ChatTokenizer) -> None:
    assert (chat.pad, chat.eos, chat.im_start, chat.im_end) == (0, 1, 2, 3)
    assert chat.decode([0, 1, 2, 3], keep_special=True) == "<|pad|><|eos|><|im_start|><|im_end|>"
    assert chat.decode([0, 1, 2, 3]) == ""


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back_and_has_no_special_id(chat: ChatTokenizer, text: str) -> None:
    ids = chat.encode(text)
    assert chat.decode(ids) == text
    assert min(ids, default=4) >= 4
    assert chat.encode_batch([text, "x"])[0] == ids


def test_white_space_without_end_is_read_in_parts(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.tokenizer.LONGEST_SPACE", 5)
    text = "cat" + " " * 11 + "mat\n" + "\t" * 5 + "12"
    parts = ["cat     ", "     ", " mat\n\t\t\t\t", "\t12"]
    assert "".join(parts) == text
    ids = chat.encode(text)
    assert ids == [token for part in parts for token in chat.encode(part)]
    assert chat.encode_batch(["cat", text]) == [chat.encode("cat"), ids]
    assert chat.decode(ids) == text


def test_every_byte_has_a_token(chat: ChatTokenizer) -> None:
    text = "".join(map(chr, range(0x20, 0x2000, 7))) + "🙂\x00\x7f"
    assert chat.decode(chat.encode(text)) == text


def test_a_conversation_by_hand(chat: ChatTokenizer) -> None:
    rendered = chat.render(
        [{"role": "user", "content": "猫?"}, {"role": "assistant", "content": "cat"}]
    )
    user, assistant = chat.encode("user\n"), chat.encode("assistant\n")
    question, answer, line = chat.encode("猫?"), chat.encode("cat"), chat.encode("\n")
    assert rendered.ids == [2, *user, *question, 3, *line, 2, *assistant, *answer, 3, *line]
    before = 1 + len(user) + len(question) + 1 + len(line) + 1 + len(assistant)
    expected = [False] * before + [True] * (len(answer) + 1) + [False] * len(line)
    assert rendered.is_answer == expected


@settings(max_examples=200, deadline=None)
@given(messages=dialogues(ANY_TEXT), for_generation=st.booleans())
def test_no_message_can_forge_a_turn(
    chat: ChatTokenizer, messages: list[dict[str, str]], for_generation: bool
) -> None:
    rendered = chat.render(messages, for_generation=for_generation)
    assert len(rendered.ids) == len(rendered.is_answer)
    assert rendered.ids.count(chat.im_start) == len(messages) + for_generation
    assert rendered.ids.count(chat.im_end) == len(messages)
    assert chat.eos not in rendered.ids
    answers = [
        t for t, is_answer in zip(rendered.ids, rendered.is_answer, strict=True) if is_answer
    ]
    said = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    assert chat.decode(answers, keep_special=True) == "".join(f"{s}<|im_end|>" for s in said)


SYSTEM = "  你是\"Bessemer\" {{ x }} {%- if %}\n\\ 'ok'. "


@pytest.fixture(scope="module")
def prompted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """The same tokenizer with a default system prompt."""
    path = tmp_path_factory.mktemp("prompted")
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    write_tokenizer(path, model, "qwen2", system=SYSTEM)
    config = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == chat_template(SYSTEM)
    return ChatTokenizer(path)


@settings(max_examples=150, deadline=None)
@given(messages=dialogues(UNFORGED), for_generation=st.booleans(), has_prompt=st.booleans())
def test_the_template_gives_the_same_ids(
    folder: Path,
    chat: ChatTokenizer,
    prompted: ChatTokenizer,
    messages: list[dict[str, str]],
    for_generation: bool,
    has_prompt: bool,
) -> None:
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(chat_template(SYSTEM if has_prompt else "")).render(
        messages=messages, add_generation_prompt=for_generation
    )
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = plain.encode(text, add_special_tokens=False).ids
    ours = prompted if has_prompt else chat
    assert ids == ours.render(messages, for_generation=for_generation).ids


def test_a_default_system_prompt_stands_before_who_brings_none(
    chat: ChatTokenizer, prompted: ChatTokenizer
) -> None:
    system = {"role": "system", "content": SYSTEM}
    question, other = {"role": "user", "content": "猫?"}, {"role": "system", "content": "cat"}
    assert prompted.render([question]) == chat.render([system, question])
    assert prompted.render([]) == chat.render([system])
    assert prompted.render([other, question]) == chat.render([other, question])


def test_transformers_gives_the_same_ids(folder: Path, chat: ChatTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), chat_template=CHAT_TEMPLATE
    )
    pick = random.Random(0)
    pieces = ["猫", "cat sat", "\n", "user\n", "system", "<|im", "|>", " 12 ", "assistant\n", "。"]
    for _ in range(30):
        messages = [
            {
                "role": pick.choice(["system", "user", "assistant"]),
                "content": "".join(pick.choices(pieces, k=pick.randrange(9))),
            }
            for _ in range(pick.randrange(1, 5))
        ]
        for is_open in (False, True):
            found = theirs.apply_chat_template(
                messages, add_generation_prompt=is_open, return_dict=False
            )
            assert found == chat.render(messages, for_generation=is_open).ids


def test_tokens_that_no_text_gives_are_found(tmp_path: Path) -> None:
    content = json.loads(train(TEXTS, TokenizerConfig(vocabulary=400)).to_str())
    ids, never = content["model"]["vocab"], 2 + 11  # C0, C1, F5 to FF
    size = len(ids)
    ids["xqz"] = size  # no merge makes it
    write_tokenizer(tmp_path, tokenizers.Tokenizer.from_str(json.dumps(content)), "qwen2")
    chat = ChatTokenizer(tmp_path)
    found = chat.unreachable()
    assert len(found) == never + 1
    assert size in found
    assert {chat.shown(token) for token in found if token < size} == {
        f"‹{byte:02X}›" for byte in (0xC0, 0xC1, *range(0xF5, 0x100))
    }


def test_an_unknown_role_is_refused(chat: ChatTokenizer) -> None:
    with pytest.raises(ValueError, match="role 'tool'; use one of system, user, assistant"):
        chat.render([{"role": "tool", "content": "x"}])


def test_a_copy_is_the_same_and_a_mixture_is_refused(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder, tmp_path / "copy")
    assert ChatTokenizer(tmp_path / "copy").digest == ChatTokenizer(folder).digest
    meta = tmp_path / "copy" / "tokenizer.meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "digest": "0" * 64}))
    with pytest.raises(ValueError, match="not of one tokenizer"):
        ChatTokenizer(tmp_path / "copy")


def test_missing_special_tokens_are_refused(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    with pytest.raises(ValueError, match="special tokens have ids"):
        write_tokenizer(tmp_path, model, "gpt-2")
