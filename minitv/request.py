"""What a run is asked to be: values from a preset, from the run that it goes on from, from a file, and from the user.

    request = Request({"resume": "runs/mine"})
    experiment, sources = request.experiment(("arguments", {"steps": 4000}))

Some choices decide which options there are and what their defaults are, so they come first: NAMES.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from . import tasks
from .checkpoint import read_run, run_folder
from .config import settings, shown
from .errors import CheckpointError, UserError, naming
from .experiment import (
    DEFAULT_VARIANT,
    Experiment,
    Layer,
    combine,
    default_task,
    from_checkpoint,
    namespace,
    preset_layers,
)
from .options import DEFAULT_PRESET, TrainOptions
from .variants import load

NAMES = ("variant", "task", "preset", "resume", "init_from")


class Request:
    """The variant, the task and the options of a run, by the names that were chosen; None stands for no choice.

    ``sources`` says where each choice came from, and ``file`` holds the other values of a --config file, if there is one. A
    resumed run has its own options, of which some may change; one that begins with the weights of another has the options of
    that model, and of the data that it knows, in place of the preset's.
    """

    def __init__(self, chosen: Mapping[str, Any], sources: Mapping[str, str] | None = None, file: Layer | None = None):
        chosen = dict.fromkeys(NAMES) | chosen
        self.sources = {name: "default" if value is None else "arguments" for name, value in chosen.items()} | (sources or {})
        resume, origin = (self._folder(name, chosen[name]) for name in ("resume", "init_from"))
        stored = None
        if resume or origin:
            with naming(f"--resume {resume}" if resume else f"--init-from {origin}", CheckpointError):
                stored = from_checkpoint(read_run(resume or origin).config)
            where = f"checkpoint {resume or origin}"
            for name, fixed in (("variant", stored.variant.name), ("task", stored.task.name)):
                if resume and self.sources[name] != "default" and chosen[name] != fixed:
                    raise UserError(f"--resume {resume}: this is a run of {fixed}, it cannot continue as {chosen[name]}")
                if self.sources[name] == "default" or resume:
                    chosen[name], self.sources[name] = fixed, where
        self.variant = load(DEFAULT_VARIANT if chosen["variant"] is None else str(chosen["variant"]))
        self.task = tasks.load(default_task(self.variant) if chosen["task"] is None else str(chosen["task"]))
        self.options = namespace(self.variant, self.task)

        self._resume, self._stored = resume, {}
        self._kept: list[Layer] = []  # what a resumed run has
        self._layers: list[Layer] = []  # what is asked for
        if not resume or chosen["preset"] is not None:
            preset = DEFAULT_PRESET if chosen["preset"] is None else str(chosen["preset"])
            self._layers += preset_layers(self.variant, self.task, preset)
        if resume:
            self._stored = {k: v for k, v in stored.values.items() if k in self.options.settings}
            self._stored |= dict(out=str(run_folder(resume)), resume=resume, overwrite=False)
            self._kept.append((where, self._stored))
        elif origin:
            # Not what is harmless: the text of that run, and how its characters are written.
            fixed = stored.identity("model", "mixer", "data")
            self._layers.append((where, {k: v for k, v in fixed.items() if k in self.options.settings}))
        if self.sources["init_from"] != "default":
            self._layers.append((self.sources["init_from"], {"init_from": origin}))
        if file is not None:
            self._layers.append(file)

    def _folder(self, name: str, value: Any) -> str | None:
        """The folder that a choice names, or None."""
        setting, source = settings(TrainOptions)[name], self.sources[name]
        value = setting.check(value, f"{source}: {name}" if source not in ("command line", "default") else setting.flag)
        if value == "":
            raise UserError(f"{setting.flag}: an empty text is no folder")
        return value

    @property
    def values(self) -> dict[str, Any]:
        """The options before the user's own."""
        return self.options.merge(*self._kept, *self._layers)[0]

    def experiment(self, *layers: Layer) -> tuple[Experiment, dict[str, str]]:
        """The run with further values, the later wins, and where each value and choice came from.

        UserError where a value would make a resumed run another run.
        """
        layers = *self._layers, *layers
        if self._resume:
            self.options.merge(*layers)  # the names are known
            self._check_resumable(layers)
        experiment, sources = combine(self.variant, self.task, *self._kept, *layers)
        return experiment, {**sources, **self.sources}

    def _check_resumable(self, layers: tuple[Layer, ...]) -> None:
        for source, layer in layers:
            for name, value in layer.items():
                setting, old = self.options.settings[name], self._stored[name]
                value = setting.check(value, f"{source}: {name}")
                if name == "out" and value is not None:
                    value, old = os.path.abspath(value), os.path.abspath(old)
                if setting.resumable or name == "resume" or value == old or (name == "out" and value is None):
                    continue
                may = ", ".join(other.flag for other in self.options.settings.values() if other.resumable)
                raise UserError(
                    f"--resume {self._resume}: {setting.flag} is {shown(old)} in this run and cannot become {shown(value)} "
                    f"({source}); what may change: {may}"
                )
