import pytest
from hypothesis import given
from hypothesis import strategies as st

from titanarch.config.keys import KeyPath, join_key, split_key


@given(st.lists(st.text(), min_size=1, max_size=4), st.lists(st.integers(0, 99), max_size=2))
def test_text_of_a_path_is_read_back(names: list[str], indices: list[int]) -> None:
    path: KeyPath = (*names, *indices, "last")
    assert split_key(join_key(path)) == path


def test_text_is_as_short_as_toml_allows() -> None:
    assert join_key(("data", "sources", 0, "a b", 'c"')) == 'data.sources[0]."a b"."c\\""'
    assert split_key("") == ()


@pytest.mark.parametrize("text", ["a.", ".a", "a..b", "a[x]", "a[0]b", "a b", '"a', "a[0]."])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no TOML key|no key"):
        split_key(text)
