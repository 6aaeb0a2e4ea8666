"""Numbers of bytes as people read them."""


def text_of(number_of_bytes: float | int) -> str:
    """Bytes in the unit that suits them, such as ``1.5 kB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number_of_bytes >= scale:
            return f"{number_of_bytes / scale:.3g} {unit}"
    return f"{number_of_bytes:.0f} B"
