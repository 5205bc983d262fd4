"""Saving a figure so that the same figure gives the same bytes, whenever and however often it is saved."""

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from . import style

FORMATS = ("png", "pdf", "svg")

# Dates and versions that matplotlib would write by itself: off.
_METADATA = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


def render(figure: Figure, suffix: str, **rc: object) -> bytes:
    """The bytes of a figure in one of ``FORMATS``. ``rc``: settings that differ from the common style."""
    buffer = io.BytesIO()
    with mpl.rc_context({**style.RC, **rc}):
        figure.savefig(buffer, format=suffix, metadata=_METADATA[suffix])
    return buffer.getvalue()


def save(figure: Figure, name: str, folder: Path, formats: tuple[str, ...]) -> list[Path]:
    """Write ``<folder>/<name>.<format>`` for each format; -> the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix in formats:
        path = folder / f"{name}.{suffix}"
        path.write_bytes(render(figure, suffix))
        paths.append(path)
    return paths
