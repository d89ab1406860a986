"""Identity has one byte form, refuses what has none, and tells what differs."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.identity import canonical_json, differences, fingerprint, hash_file

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


def test_the_byte_form_by_hand() -> None:
    assert (
        canonical_json({"b": [1, 0.5, None], "a": "字"}) == '{"a":"字","b":[1,0.5,null]}'.encode()
    )


def test_the_fingerprint_is_the_sha256_of_it() -> None:
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), JSON))
def test_key_order_does_not_matter(value: dict[str, object]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), {1: "a"}, {"a": {2}}, Path("x"), b"x", {"a": [object()]}],
)
def test_what_has_no_stable_form_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"\$"):
        canonical_json(value)


def test_text_without_a_utf8_form_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        canonical_json({"a": "\ud800"})


def test_differences_name_the_field() -> None:
    old = {"settings": {"threshold": 0.8, "rows": 6}, "inputs": {"corpus": "aa"}}
    new = {"settings": {"threshold": 0.7, "rows": 6}, "inputs": {"corpus": "aa"}, "version": 2}
    assert list(differences(old, new)) == [
        "settings.threshold: 0.8 -> 0.7",
        'version: "absent" -> 2',
    ]


def test_a_file_hash_is_xxh3_128(tmp_path: Path) -> None:
    # xxh3-128 of no bytes, from the reference implementation's test vectors
    path = tmp_path / "empty"
    path.write_bytes(b"")
    assert hash_file(path) == "99aa06d3014798d86001c324468d497f"
    path.write_bytes(b"x" * (5 << 20))  # more than one chunk
    import xxhash

    assert hash_file(path) == xxhash.xxh3_128_hexdigest(b"x" * (5 << 20))
