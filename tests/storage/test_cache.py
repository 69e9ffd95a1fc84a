from __future__ import annotations

from pathlib import Path

import pytest

from factorlm.storage import cache_folder


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [
        (None, None, "home/.cache/factorlm"),
        (None, "relative", "home/.cache/factorlm"),
        (None, "/base", "/base/factorlm"),
        ("/own", "/base", "/own"),
        ("", "/base", "/base/factorlm"),
    ],
)
def test_the_first_that_is_set(
    own: str | None, base: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FACTORLM_CACHE", own), ("XDG_CACHE_HOME", base), ("HOME", "home")):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)
