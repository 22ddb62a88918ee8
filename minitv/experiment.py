"""An experiment: a variant on a task, with all their options. It is a run's identity, and a checkpoint keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autograd.random import Random

from . import room, tasks, variants
from .config import Options, choose, from_json, settings, shown, to_json
from .errors import UserError
from .options import DEFAULT_PRESET, PRESETS, ModelOptions, TrainOptions
from .schema import RunConfig
from .task import Task

if TYPE_CHECKING:
    from .variant import Variant

DEFAULT_VARIANT, DEFAULT_TASK = "transformer", "text"
PARTS = ("model", "mixer", "data", "run")  # the groups of options, as checkpoints name them

WEIGHTS, BATCHES, DROPOUT, SHOWN, BUFFERS = range(5)  # the independent random streams of a run

Layer = tuple[str, Mapping[str, Any]]  # where values come from, and the values by name


@dataclass(frozen=True)
class Experiment:
    """A variant, a task, and the options of the model, of the variant's mixer, of the task's data, and of the training."""

    variant: Variant
    task: type[Task]
    model: ModelOptions
    mixer: Any
    data: Any
    run: TrainOptions

    @property
    def options(self) -> tuple[Any, ...]:
        """The option dataclasses in the order of PARTS."""
        return tuple(getattr(self, part) for part in PARTS)

    @property
    def values(self) -> dict[str, Any]:
        """Every option by name."""
        return {name: getattr(config, name) for config in self.options for name in settings(type(config))}

    def identity(self, *parts: str) -> dict[str, Any]:
        """The options on which the results depend, of all parts unless some are named."""
        of = [getattr(self, part) for part in parts or PARTS]
        return {name: getattr(config, name) for config in of for name, setting in settings(type(config)).items()
                if not setting.harmless}

    def replace(self, **values: Any) -> Experiment:
        """The same experiment with other values of some options."""
        parts = {part: dataclasses.replace(config, **{k: v for k, v in values.items() if k in settings(type(config))})
                 for part, config in zip(PARTS, self.options, strict=True)}
        return dataclasses.replace(self, **parts)

    def begin(self, saved: Mapping[str, Any] | None = None) -> Task:
        """The task's data; ``saved`` is the task's part of a checkpoint."""
        seed = Random(self.run.seed).split(BATCHES).seed
        return self.task(self.data, self.model.context, self.run.batch, seed, saved)

    def size(self, vocab: int, copies: int = 1) -> int:
        """The bytes of the model's weights and tables; UserError if the machine cannot hold that, or so many copies of it."""
        size = room.measured(lambda: self._build(vocab))
        room.check(size, "the model")
        room.check(copies * size, f"training the model ({copies} arrays of its size)")
        return size

    def shapes(self, vocab: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays that a checkpoint has of the model, by name; none is made. UserError as of ``size``."""
        found: dict[str, tuple[int, ...]] = {}
        room.measured(lambda: found.update({name: array.shape for name, array in self._build(vocab).saved().items()}))
        self.size(vocab)
        return found

    def build(self, vocab: int, copies: int = 1) -> Any:
        """A new model, with the weights that follow from the seed; UserError as of ``size``."""
        self.size(vocab, copies)
        return self._build(vocab)

    def _build(self, vocab: int) -> Any:
        return self.variant.build(self.model, self.mixer, vocab, Random(self.run.seed).split(WEIGHTS),
                                  **self.task.shape(self.data))

    def to_json(self) -> dict[str, Any]:
        """The experiment for a checkpoint or a log: all that ``from_json`` needs."""
        run = dataclasses.replace(self.run, resume=None)
        return {"variant": self.variant.name, "task": self.task.name, "model": to_json(self.model),
                "mixer": to_json(self.mixer), "data": to_json(self.data), "run": to_json(run)}

    def rows(self, sources: Mapping[str, str]) -> list[tuple[str, str, Any, str]]:
        """(group, name, value, source) of the variant, the task and every option that is offered, for ``config.table``."""
        group = "minitv train"
        rows = [(group, "variant", self.variant.name, sources["variant"]), (group, "task", self.task.name, sources["task"])]
        offered = namespace(self.variant, self.task).settings
        for config in self.options:
            for name, setting in settings(type(config)).items():
                if name in offered:
                    rows.append((setting.group, name, getattr(config, name), sources[name]))
        return rows


def namespace(variant: Variant, task: type[Task]) -> Options:
    """The options that a variant has on a task."""
    if not suits(variant, task):
        reason = "sees the past alone, and this task asks for what both sides say"
        if task.reads != variant.reads:
            reason = f"reads {variant.reads}, and this task has {task.reads}"
        elif task.causal:
            reason = "sees the whole sequence at once, and the answers of this task stand in it"
            reason += variant.not_causal and f"; {variant.not_causal}"
        others = [name for name in variants.variants() if suits(variants.load(name), task)]
        raise UserError(f"--task {task.name}: {variant.name} {reason}; tasks for it: {', '.join(possible(variant))}; "
                        f"variants for this task: {', '.join(others)}")
    return Options(ModelOptions, variant.options, task.Options, TrainOptions, without=variant.without, elsewhere=elsewhere)


def suits(variant: Variant, task: type[Task]) -> bool:
    """Whether a variant can be trained for a task."""
    return task.reads == variant.reads and task.causal in (None, variant.causal)


def possible(variant: Variant) -> list[str]:
    """The tasks that a variant can be trained for."""
    return [name for name in tasks.tasks() if suits(variant, tasks.load(name))]


def default_task(variant: Variant) -> str:
    """The task that a variant is trained for unless another is asked for."""
    names = possible(variant)
    if not names:
        raise UserError(f"{variant.name}: there is no task for it, which reads {variant.reads}")
    names.sort(key=lambda name: (name != DEFAULT_TASK, tasks.load(name).causal is None))
    return names[0]


def elsewhere(name: str) -> str:
    """For an error: which variants or tasks have an option of this name."""
    for what, owners in (("", [(entry.name, entry.load().options) for entry in variants.variants().values()]),
                        ("the task", [(entry.name, entry.load().Options) for entry in tasks.tasks().values()])):
        if having := [owner for owner, options in owners if name in settings(options)]:
            what += what and "s " if len(having) > 1 else what and " "
            return f"; it is an option of {what}{', '.join(having)}"
    return ""


def preset_layers(variant: Variant, task: type[Task], name: str) -> list[Layer]:
    """The values of a preset: what the task wants, what all variants share, what the variant wants, and wants on this task."""
    choose("preset", name, PRESETS)
    offered = namespace(variant, task).settings
    layers = [(f"task {task.name}", task.defaults), (f"preset {name}", PRESETS[name]), (variant.name, variant.overrides),
              (f"preset {name}", variant.presets.get(name, {})),
              (f"{variant.name} on {task.name}", variant.on_tasks.get(task.name, {}))]
    return [(source, {k: v for k, v in values.items() if k in offered}) for source, values in layers]


def merge(variant: Variant, task: str | None, preset: str | None, *layers: Layer) -> tuple[Experiment, dict[str, str]]:
    """The experiment of a preset and further layers, the later wins, and where each value came from."""
    cls = tasks.load(default_task(variant) if task is None else task)
    return combine(variant, cls, *preset_layers(variant, cls, DEFAULT_PRESET if preset is None else preset), *layers)


def combine(variant: Variant, task: type[Task], *layers: Layer) -> tuple[Experiment, dict[str, str]]:
    """The experiment of all layers, the later wins, and where each value came from."""
    options = namespace(variant, task)
    values, sources = options.merge(*layers)
    experiment = Experiment(variant, task, *options.build(values))
    for name, value in experiment.values.items():  # what follows from other values
        if name in sources and values[name] is None and value is not None:
            sources[name] += f", here {shown(value)}"
    return experiment, sources


def from_checkpoint(config: RunConfig) -> Experiment:
    """The experiment of a checkpoint's config; UserError says what in it is not as declared.

    Checkpoints of earlier versions know one task, text, whose options stand among those of the run.
    """
    variant, task = variants.load(config.variant), tasks.load(config.task or DEFAULT_TASK)
    parts = {part: getattr(config, part) for part in PARTS}
    if parts["data"] is None:
        of_task = settings(task.Options)
        parts["data"] = {k: v for k, v in config.run.items() if k in of_task}
        parts["run"] = {k: v for k, v in config.run.items() if k not in of_task}
    if "tf32" in parts["run"]:  # what this option of earlier versions said
        parts["run"] = {"matmul": "tf32" if parts["run"]["tf32"] else "float32",
                        **{k: v for k, v in parts["run"].items() if k != "tf32"}}
    shared = settings(ModelOptions)  # what is the paper's choice was no option in older checkpoints
    parts["model"] = {**{k: v for k, v in variant.overrides.items() if k in shared and shared[k].newer}, **parts["model"]}
    classes = ModelOptions, variant.options, task.Options, TrainOptions
    return Experiment(variant, task, *(from_json(cls, parts[part], part) for cls, part in zip(classes, PARTS, strict=True)))
