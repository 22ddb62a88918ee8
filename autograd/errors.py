"""The engine's errors. Each message names the operator, the argument, what was given and what is allowed."""


class AutogradError(Exception):
    """Base of every error the engine raises on purpose."""


class ShapeError(AutogradError, ValueError):
    """Shapes or axes that do not fit the operator."""


class DtypeError(AutogradError, TypeError):
    """A dtype the operator does not take, or a mixture of dtypes."""


class DomainError(AutogradError, ValueError):
    """A value outside the operator's domain: a label, an id, a probability."""


class GraphError(AutogradError, RuntimeError):
    """A misuse of the graph: a second backward, a missing seed, a changed saved input."""


class KernelError(AutogradError, RuntimeError):
    """A form or kernel that was asked for does not exist or does not support the call."""


class DeviceError(AutogradError, RuntimeError):
    """A device that does not exist here; the message says what is missing and how to get it."""


class NonFiniteError(AutogradError, ArithmeticError):
    """The first operator that made a NaN or an infinity, found in check mode."""


class RankError(AutogradError, RuntimeError):
    """Another process of the job that ended, hangs or disagrees, or what is missing for several processes."""
