"""What the tasks on images and on sound share: data that may be a file, bits for each value, and files that are written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import CheckpointError, UserError
from ..task import EVERYTHING, Task


class Media(Task):
    """A task whose model predicts integers one after the other.

    ``form`` are the numbers that the data of a model must have, and ``sha256`` is the hash of the data, or "" where it is drawn
    and follows from the options. ``description`` and ``notes`` say what the data is, and what was done to it.
    """

    rising = False
    hashed, judged = "data_sha256", ("bits", "value", "values")
    form: dict[str, int]
    sha256: str
    notes: list[str]

    def check_same(self, saved: Mapping[str, Any] | None) -> None:
        """Raise UserError if the data is not that of a checkpoint, or does not have its form."""
        if saved is None:
            return
        form, sha256 = self.stored_form(saved), saved.get("data_sha256")
        for name, value in form.items():
            if self.form[name] != value:
                raise UserError(f"--data: {self.description} has {name} {self.form[name]}, and the model knows {name} {value}")
        if sha256 not in (self.sha256, EVERYTHING):
            raise UserError(f"--data: {self.description} is not the data this run began with; give that again")

    def state(self) -> dict[str, Any]:
        return {"form": self.form, "data_sha256": self.sha256}

    @classmethod
    def stored_form(cls, saved: Mapping[str, Any]) -> dict[str, int]:
        """The form, from a checkpoint's state."""
        form = saved.get("form")
        if not isinstance(form, Mapping) or any(type(value) is not int or value < 1 for value in form.values()):
            raise CheckpointError("the checkpoint has no form, an object of positive integers")
        return dict(form)

    def remarks(self, sums: np.ndarray) -> list[str]:
        return self.notes

    def value(self, sums: np.ndarray) -> float:
        return float(sums[0] / sums[1] / math.log(2))

    def training_value(self, loss: float) -> float:
        return loss / math.log(2)

    def about(self) -> list[tuple[str, str]]:
        return [("data", self.description), *(("note", text) for text in self.notes), *super().about()]

    def header(self) -> dict[str, Any]:
        return {"corpus": {"description": self.description, "sha256": self.sha256}}


def digest(array: np.ndarray) -> str:
    """The SHA-256 of an array, its shape included."""
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()
