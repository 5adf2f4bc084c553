"""One exception class per user mistake. Every message names what is wrong, where, and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MOST_CHOICES_LISTED = 30


class PadstError(Exception):
    """Base class of everything this package raises on purpose."""


class SpecError(PadstError, ValueError):
    """A sparsity specification that cannot mean anything."""


class UnknownFieldError(SpecError):
    """A key, option or name that does not exist."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown {what} {name!r}{did_you_mean(name, known)}")


class SparsityMismatchError(SpecError):
    """`sparsity` contradicts what the structure fixes (N:M)."""


class PatternError(SpecError):
    """A target pattern, or one in a mapping, that matches no layer; or any that is no valid pattern."""


class StructureMismatchError(PadstError, ValueError):
    """A structure that does not fit the shape of a layer."""

    def __init__(self, module: str, reason: str, fix: str) -> None:
        super().__init__(f"layer {module!r}: {reason}; {fix}")
        self.module = module


class EmptyLayerError(StructureMismatchError):
    """A sparsity that would leave a layer without any active weight."""


class NothingToSparsifyError(PadstError, ValueError):
    """A request under which every layer stays dense."""


class AlreadySparseError(PadstError, ValueError):
    """A model that was sparsified before."""


class CompiledModelError(PadstError, TypeError):
    """A model that was compiled before `sparsify`; its compiled code would keep the dense layers."""


class MetaDeviceError(PadstError, ValueError):
    """A layer whose weights are on the meta device and hold no values to keep."""


class MissingInputsError(PadstError, TypeError):
    """A request that depends on the model's graph, without inputs to capture it with."""


class InvalidPermutationError(PadstError, ValueError):
    """An index tensor that is not a permutation of the features it is applied to."""


class InvalidTopologyError(PadstError, IndexError):
    """Index tensors of a layer that were overwritten with what its structure cannot mean."""

    def __init__(self, structure: str, reason: str) -> None:
        super().__init__(f"a layer of {structure} has index tensors that it cannot have: {reason}; load a checkpoint of it")


class PermutationScoresError(PadstError, ValueError):
    """Scores or a soft matrix that no permutation can be chosen by: not square, not finite, or in too few bits."""


class FeatureMismatchError(PadstError, ValueError):
    """An input whose last dimension is not the layer's `in_features`."""


class UnknownOptionError(UnknownFieldError):
    """An option that neither this backend nor Inductor knows."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__("option of backend 'padst'", name, known)


class InvalidOptionError(PadstError, ValueError):
    """A known option of the backend with a value it does not take."""


class UnknownModelError(PadstError, ValueError):
    """A model name that the command line cannot build."""


class MissingDeviceError(PadstError, RuntimeError):
    """A device that this machine does not have."""


class MissingPackageError(PadstError, ImportError):
    """An optional package that a request needs."""


class TrainingDataError(PadstError, ValueError):
    """Training data that is not there, or that cannot be read as what it should be."""


class RunFolderError(PadstError, RuntimeError):
    """A run folder that belongs to another configuration, is in use, or is damaged."""


class TrainingDivergedError(PadstError, ArithmeticError):
    """A loss that is no longer a number."""


class DrawingError(PadstError, ValueError):
    """A picture that cannot be drawn: of a module that is not there, or in a format that is not known."""


class UnsupportedGraphError(PadstError, TypeError):
    """A graph that the passes cannot work on as given."""


class RegistrationError(PadstError, TypeError):
    """A structure, pass or kernel that cannot be registered: it lacks part of its interface."""


class NameTakenError(RegistrationError):
    """A name under which something else is registered, or that this package uses itself."""


class ModuleImportError(PadstError, ImportError):
    """A module given to `--import` that cannot be imported."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"--import {module}: {reason}")


class NoUnitsError(PadstError, NotImplementedError):
    """A structure that does not say what its units are, where one is needed that does."""

    def __init__(self, kind: str) -> None:
        super().__init__(
            f"structure {kind!r} defines no units, which are what dynamic sparse training chooses among; define "
            "units_per_pool, unit_totals, active_units and topology_of"
        )


class TrainingConfigError(PadstError, ValueError):
    """A training configuration that cannot mean anything, or lacks what its method needs."""


class AttachError(PadstError, ValueError):
    """A model and optimizers that `padst.attach` cannot train."""


class AlreadyAttachedError(AttachError):
    """A second `attach` of the same layers; two runtimes would both move their weights."""


class NotAttachedError(PadstError, ValueError):
    """A model without a runtime, where one is needed."""


class ResumeError(PadstError, ValueError):
    """A training state that does not belong to this model and configuration."""


class CheckpointError(PadstError, RuntimeError):
    """A checkpoint that is missing or damaged, or that cannot be written."""


class CalibrationError(PadstError, ValueError):
    """Example batches that do not show what a layer reads."""


class PretrainedError(PadstError, RuntimeError):
    """A saved sparse model that is missing, foreign, damaged or of another model, or that cannot be written."""


class InvariantError(PadstError, AssertionError):
    """Topology, weights or optimizer state that contradict each other after an update."""


class VerificationError(PadstError):
    """Base class of what keeps `padst.verify` from a verdict."""


class VerificationInputError(VerificationError, ValueError):
    """Arguments of `verify` that it cannot work on."""


class UnsupportedOperationError(VerificationError):
    """An operator on computed values that has no meaning over residues."""

    def __init__(self, operator: str, where: str, detail: str = "") -> None:
        reason = f" ({detail})" if detail else ""
        super().__init__(f"cannot verify {operator}{reason} in {where}; verify the parts of the model around it instead")
        self.operator = operator


class DataDependentError(UnsupportedOperationError):
    """A program whose path or order depends on computed values, which residues cannot decide."""

    def __init__(self, operator: str, where: str) -> None:
        super().__init__(operator, where, "it reads, orders or rounds computed values")


class RandomOperationError(UnsupportedOperationError):
    """A program that draws random numbers."""

    def __init__(self, operator: str, where: str) -> None:
        super().__init__(operator, where, "it draws random numbers; call .eval() on both modules")


class NotEquivalentError(PadstError, AssertionError):
    """Two modules that were to compute the same function do not."""


class WrongPassError(NotEquivalentError):
    """A pass that changed what a graph computes."""

    def __init__(self, name: str, difference: str, script: str) -> None:
        super().__init__(
            f"pass {name} changed what the graph computes, in {difference}; reproduce it with `python {script}`, "
            f"and compile with options={{'disable': [{name!r}]}} until it is fixed"
        )
        self.name, self.script = name, script


def first_line(error: Exception) -> str:
    """The beginning of what another library raised, for the middle of a sentence; its type where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else the sorted choices."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(choices)}" if 0 < len(choices) <= _MOST_CHOICES_LISTED else ""
