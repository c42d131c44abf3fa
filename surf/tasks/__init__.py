"""Evaluation tasks: readers for public file formats, and the scorers that belong to them.

Importing this package is cheap: numpy, pyarrow and the scoring libraries are imported by the functions that need them.
"""

from surf.tasks import caption, choice, classify, pope, vqa
from surf.tasks.base import Question, Task

__all__ = ["KINDS", "Question", "Task"]

KINDS: dict[str, Task] = {"pope": pope, "vqa": vqa, "choice": choice, "caption": caption, "classify": classify}
