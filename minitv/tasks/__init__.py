"""Tasks: what a model is trained for. A module declares one or several, as ``class Text(Task, name="text", summary="...")``.

A task owns its data, its loss, the figure that says how good a model is, baselines that do not learn, what a person sees while
a model trains, and its part of a checkpoint (task.py). The trainer, the command line and the reports know no more of a task
than stands there. ``--task NAME`` chooses one, and its ``Options`` become options of the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..catalogue import Entry, entries
from ..config import choose

if TYPE_CHECKING:
    from ..task import Task


def tasks() -> dict[str, Entry]:
    """Every task by name; imports none of them."""
    return entries(__name__, __path__)


def load(name: str) -> type[Task]:
    """The class of a task; UserError when there is none of this name."""
    return tasks()[choose("task", name, tasks())].load()
