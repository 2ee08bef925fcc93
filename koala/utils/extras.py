"""Packages that only some commands need: pyproject.toml lists them as extras."""

from importlib.util import find_spec

from koala.errors import UserError

_EXTRAS = {"fsspec": "train", "pyarrow": "train"}  # packages of extras, imported unasked


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


def explained(what: str, error: ModuleNotFoundError) -> Exception:
    """What to raise where importing `what` failed: UserError with the line that installs a package.

    A module of KOALA's own that is missing is no matter of installing: the error itself.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "koala"):
        return error
    extra = f"'.[{_EXTRAS[package]}]'" if package in _EXTRAS else "."
    return UserError(f"{what}: {package} is not installed; run pip install -e {extra}")
