"""Texts as bytes: where they are read from, and how they are split into parts."""

from importlib import import_module
from pathlib import Path

from condattn.openmmlab.errors import UserError

PARTS = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
"""Part -> its first tenth of the text, and the first tenth behind it."""
BUILTIN = "pydoc_data.topics"
"""In place of a path: the built-in text."""


def read_text(path: str = BUILTIN) -> bytes:
    """Read a text.

    Args:
        path: A text file in any encoding without zero bytes (UTF-8, Latin-1, ...), or a folder, whose ``.txt`` files
            are joined in the order of their paths. ``BUILTIN`` is :func:`builtin_text`.

    Raises:
        UserError: If there is no such file or folder, a folder has no ``.txt`` file, or a file cannot be read, is
            empty, or contains zero bytes.
    """
    if path == BUILTIN:
        return builtin_text()
    source = Path(path)
    if source.is_dir():
        files = sorted(file for file in source.rglob("*.txt") if file.is_file())
        if not files:
            raise UserError(f"no text in the folder {path}: expected files whose names end in .txt")
    elif source.exists():
        files = [source]
    else:
        raise UserError(
            f"no text file or folder {path}; correct the path (the environment variable LANGUAGE_MODEL_TEXT, or the "
            f"setting path of the data sets), or use {BUILTIN} for the built-in text"
        )
    return b"".join(_read_file(file) for file in files)


def _read_file(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"the text file {file} cannot be read: {error.strerror}") from error
    if not content:
        raise UserError(f"the text file {file} is empty; expected text")
    if (position := content.find(0)) >= 0:
        raise UserError(
            f"{file} is not a text file: its byte {position} is zero, which occurs in binary files and in UTF-16; "
            "convert it to UTF-8 text"
        )
    return content


def builtin_text() -> bytes:
    """The reference texts on the Python language that CPython includes for ``help()``, in UTF-8.

    They are the values of ``pydoc_data.topics.topics`` in the order of their keys. A paragraph that occurs in several
    topics is kept where it occurs first: otherwise, a tenth of the lines of the test part would occur in the training
    part. The text depends on the version of Python.

    Raises:
        UserError: If this Python does not include them.
    """
    try:
        topics = import_module(BUILTIN).topics
    except ImportError as error:
        raise UserError(
            f"this Python does not include the module {BUILTIN}, which the built-in text is made of; use a text "
            "file of your own"
        ) from error
    paragraphs: dict[str, str] = {}
    for key in sorted(topics):
        for paragraph in topics[key].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    return "\n\n".join(filter(None, paragraphs.values())).encode()


def part_of_text(size: int, part: str) -> tuple[int, int]:
    """Where a part of a text begins and ends: the first 80 % train, the next 10 % validate, the last 10 % test.

    Args:
        size: Length of the text in bytes.
        part: 'train', 'validation' or 'test'.

    Returns:
        Position of the first byte of the part, and of the first byte behind it.

    Raises:
        UserError: If there is no such part.
    """
    if part not in PARTS:
        raise UserError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    begin, end = (size * tenth // 10 for tenth in PARTS[part])
    return begin, end
