from lbopt import tables


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("a", "bb", "c"), ("aaa", "b", ""), ("", "", "cc")]
    assert tables.aligned(rows) == ["a    bb  c", "aaa  b", "         cc"]
    assert tables.aligned(rows, right=[0, 1]) == [
        "  a  bb  c",
        "aaa   b",
        "         cc",
    ]
