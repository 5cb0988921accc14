"""Numbers, intervals and times of the report as text."""

DASH = "\N{EN DASH}"


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash for one that was not measured."""
    if value is None:
        return DASH
    value = round(value, digits) + 0.0  # + 0.0 turns -0.0 into 0.0
    return f"{value:{'+' if sign and value else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def span(interval: tuple[float, float], digits: int = 3, *, sign: bool = False) -> str:
    """Return both ends of an interval."""
    return " to ".join(number(end, digits, sign=sign) for end in interval)


def duration(seconds: float | None) -> str:
    """Return seconds as a person would say them."""
    if seconds is None:
        return DASH
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
