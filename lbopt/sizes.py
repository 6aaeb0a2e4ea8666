"""Byte counts in readable units."""


def text_of(number_of_bytes: float | int) -> str:
    """Bytes with a suitable unit, such as ``1.5 kB``."""
    # Powers of ten, as memory is counted in the papers.
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.3g} {unit}"
    return f"{number_of_bytes:.0f} B"
