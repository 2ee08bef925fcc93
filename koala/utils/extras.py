"""Packages that only some commands need: pyproject.toml lists them as extras."""

from importlib.util import find_spec

from koala.errors import UserError


def absent(extra: str, *packages: str) -> str | None:
    """Which of the packages are not installed, and the line that installs them; None if all are."""
    names = [name for name in packages if find_spec(name) is None]
    if not names:
        return None
    are = "are" if len(names) > 1 else "is"
    return f"{', '.join(names)} {are} not installed; run pip install -e '.[{extra}]'"


def require(what: str, extra: str, *packages: str) -> None:
    """Raises UserError unless what `what` needs, and `extra` brings, is installed."""
    if lacking := absent(extra, *packages):
        raise UserError(f"{what}: {lacking}")
