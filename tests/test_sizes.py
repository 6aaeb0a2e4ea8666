"""Bytes in units."""

import pytest

from lbopt import sizes


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (12, "12 B"), (1500, "1.5 kB"), (2e6, "2 MB"), (3.21e9, "3.21 GB")],
)
def test_sizes(size, text):
    assert sizes.text_of(size) == text
