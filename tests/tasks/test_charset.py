"""Pages decode right whatever their charset says."""

import pytest

from tasks.charset import decode

ZH = "上海的天气今天很好，我们去公园散步，看见了很多花和鸟。\n" * 3
ZH_TW = "臺灣的天氣今天很好，我們去公園散步，看見了許多花與鳥。\n" * 3
JA = "今日は天気がいいので、公園を散歩しました。カラスと花を見ました。\n" * 3
KO = "오늘은 날씨가 좋아서 공원에서 산책을 했습니다. 꽃과 새를 보았습니다.\n" * 3
FR = "L'été dernier, les élèves ont visité le château près de la forêt.\n" * 3
RU = "Вчера была хорошая погода, и мы обедали под деревьями в саду.\n" * 3
CASES = [
    (ZH, "gb18030"),
    (ZH, "gbk"),
    (ZH_TW, "big5"),
    (JA, "shift_jis"),
    (JA, "euc_jp"),
    (KO, "euc_kr"),
    (FR, "cp1252"),
    (ZH, "utf-8"),
    (FR, "utf-8"),
    (RU, "cp1251"),
]


def page(text: str, charset: str | None) -> str:
    meta = f'<meta http-equiv="Content-Type" content="text/html; charset={charset}">'
    return f"<html><head>{meta if charset else ''}</head><body><p>{text}</p></body></html>"


@pytest.mark.parametrize(("text", "encoding"), CASES)
def test_a_declared_charset_is_used(text: str, encoding: str) -> None:
    assert decode(page(text, None).encode(encoding), declared=encoding) == page(text, None)
    assert decode(page(text, encoding).encode(encoding)) == page(text, encoding)


@pytest.mark.parametrize(("text", "encoding"), CASES)
def test_a_missing_charset_is_found(text: str, encoding: str) -> None:
    assert decode(page(text, None).encode(encoding)) == page(text, None)


@pytest.mark.parametrize(("text", "encoding"), CASES[:6])
@pytest.mark.parametrize("wrong", ["utf-8", "iso-8859-1", "no-such-charset"])
def test_a_wrong_charset_is_overruled(text: str, encoding: str, wrong: str) -> None:
    assert decode(page(text, wrong).encode(encoding), declared=wrong) == page(text, wrong)


def test_gb2312_means_gb18030_as_in_browsers() -> None:
    # 镕 is in GBK, not in GB 2312
    assert decode(page("朱镕基" + ZH, "gb2312").encode("gb18030")).count("镕") == 1


def test_a_byte_order_mark_wins() -> None:
    assert decode("猫".encode("utf-16"), declared="gbk") == "猫"
    assert decode(b"\xef\xbb\xbfcat", declared="gbk") == "cat"


def test_utf8_with_a_cut_off_end_stays_utf8() -> None:
    content = (ZH * 5).encode()[:-2]
    assert decode(content, declared="gbk").startswith(ZH * 4)


def test_any_bytes_decode_to_something() -> None:
    text = decode(bytes(range(256)) * 4)
    assert text.encode("utf-8")
    assert decode(b"") == ""


def test_latin_names_of_codecs_that_are_no_charsets_are_ignored() -> None:
    assert decode(b"<p>6361</p>", declared="hex") == "<p>6361</p>"
