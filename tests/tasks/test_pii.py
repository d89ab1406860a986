"""Personal data is masked wherever it stands, and nothing else is."""

import random
from pathlib import Path

import pytest

from conf.extract import ExtractConfig, PersonalData
from tasks.extract import extract
from tasks.pii import has_check_digit, mask
from tests.tasks.corpus_runs import run_stage, spec, texts

MASKS = {"email": "[EMAIL]", "ip": "[IP]", "phone": "[PHONE]", "identity": "[IDENTITY]"}
PLACES = [
    ("Please write to ", " before Friday."),
    ("联系方式：", "，谢谢。"),
    ("我的号码是", "有事请说"),
    ("(", ")"),
    ("", ""),
    ("see: ", "."),
    ("\n", "\n"),
    ("“", "”"),
    ("旧的是", "、新的还没有"),
]
INNOCENT = [
    "The release v2.10.3.1 of 2024-03-15 is 1.5 GB.",
    "ISBN 978-7-111-64124-7, price 139.00",
    "订单号 202403151234567890 已发货",
    "圆周率约为3.14159265358979323846",
    "run 127.0.0.1:8080 or 192.168.1.1, never 10.0.0.1",
    "会议在 10:30:45 开始，共 13800 人参加",
    "follow @someone and a@b, or x @ y.com",
    "std::vector<int>::iterator it = a::b;",
    "1234567890123456789 and 0x13800138000",
    "身份证号 110101199003071234 的校验位不对",
    "1700000000000 ms since the epoch; 13,800,138,000 people",
    "电话区号是010，邮编100084。",
    "见 300.400.500.600 号文件",
    "2024-2025学年第13期 第1380-0138页",
]


def identity_number(rng: random.Random) -> str:
    """A number with the check digit worked out as GB 11643 says: sum of digit x 2^(17-i) mod 11."""
    digits = rng.choice(["110105", "440305", "510107", "652301"])
    digits += f"{rng.randint(1930, 2015)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    digits += f"{rng.randint(0, 999):03}"
    rest = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(digits)) % 11
    check = (12 - rest) % 11
    return digits + ("X" if check == 10 else str(check))


def phone(rng: random.Random) -> str:
    mobile = rng.choice(["138", "159", "186", "199", "176", "147"])
    first, last = f"{rng.randint(0, 9999):04}", f"{rng.randint(0, 9999):04}"
    return rng.choice(
        [
            mobile + first + last,
            f"{mobile}-{first}-{last}",
            f"{mobile} {first} {last}",
            f"+86 {mobile}{first}{last}",
            f"+86-{mobile}-{first}-{last}",
            f"0086{mobile}{first}{last}",
            f"86{mobile}{first}{last}",
            f"010-6{first[1:]}{last}",
            f"(021) 5{first[1:]}{last}",
            f"0755-2{first[1:]} {last}",
            f"+86 10 8{first[1:]}{last}",
        ]
    )


def email(rng: random.Random) -> str:
    name = rng.choice(["li.lei", "zhang_san", "a", "han-mei+news", "QQ12345", "x9.y8"])
    host = rng.choice(["example.com", "mail.edu.cn", "163.com", "my-host.co.uk", "a.b.c.org"])
    return f"{name}@{host}"


def ip(rng: random.Random) -> str:
    if rng.random() < 0.3:
        return rng.choice(["2400:3200::1", "2001:4860:4860::8888", "240e:1:2:3:4:5:6:7"])
    return f"{rng.choice([8, 47, 114, 123, 220])}.{rng.randint(0, 255)}.{rng.randint(0, 255)}.9"


MAKERS = {"email": email, "ip": ip, "phone": phone, "identity": identity_number}


@pytest.mark.parametrize("kind", list(MAKERS))
def test_every_planted_piece_is_masked_and_only_that(kind: PersonalData) -> None:
    rng = random.Random(0)
    for number in range(500):
        before, after = PLACES[number % len(PLACES)]
        secret = MAKERS[kind](rng)
        # All kinds are looked for: another one must not take a piece away.
        assert mask(before + secret + after) == (before + MASKS[kind] + after, {kind: 1}), secret


@pytest.mark.parametrize("text", INNOCENT)
def test_other_numbers_stay(text: str) -> None:
    assert mask(text) == (text, {})


def test_the_check_digit_of_the_standards_example() -> None:
    # GB 11643-1999, appendix: 11010519491231002X and 440524188001010014
    assert has_check_digit("11010519491231002X")
    assert has_check_digit("440524188001010014")
    assert not has_check_digit("440524188001010015")


def test_only_the_kinds_asked_for_are_masked() -> None:
    text = "a@example.com 13800138000"
    assert mask(text, ["phone"]) == ("a@example.com [PHONE]", {"phone": 1})


def test_long_texts_without_personal_data_end_soon() -> None:
    for text in ("a." * 500_000 + "@", "1" * 10**6, "1-" * 10**6, "2001:" * 10**5, "a@" * 10**5):
        assert mask(text)[1] == {}


def test_extract_masks_what_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("请联系我：13800138000，或者写信到 a@example.com。", "utf-8")
    settings = ExtractConfig(sources=(spec("a.txt"),), mask_personal=("phone", "email"))
    outcome = run_stage(extract, settings, {}, tmp_path)
    assert texts(outcome.artifact) == ["请联系我：[PHONE]，或者写信到 [EMAIL]。"]
    assert outcome.record.metrics["masked"] == {"email": 1, "phone": 1}
