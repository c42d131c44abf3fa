"""The one error a user is meant to read."""

from collections.abc import Mapping


class SurfError(Exception):
    """A mistake the user can mend. It prints as one paragraph and ends the stage with exit code 2.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, and the row or key in it.
        expected: what should stand there.
        next: the command to type, or the file to edit, next.
    """

    def __init__(self, what: str, *, where: str = "", expected: str = "", next: str = "") -> None:
        self.what, self.where, self.expected, self.next = what, where, expected, next
        parts = [f"{where}: {what}" if where else what]
        if expected:
            parts.append(f"expected {expected}")
        if next:
            parts.append(f"next: {next}")
        super().__init__("; ".join(parts))


def first_of(errors: Mapping[str, str]) -> str:
    """What is wrong with the first three rows, by their keys."""
    return "; ".join(f"{key}: {error}" for key, error in list(errors.items())[:3])


class ImageError(Exception):
    """One image cannot be used; the message says why. Stages put it into quarantine and go on."""
