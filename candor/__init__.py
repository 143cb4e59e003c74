"""Candor: language model answers with a calibrated verdict on their reliability.

    load_bundle, Bundle       a calibrated model, from its directory
    judge, Verdicts           verdicts on many answers, from their states
    Model                     a language model in this process: states of texts, and the verdict on one answer
    calibrate, Calibrated     a bundle from states and labels
    read_records, Record      labelled data from files of any kind
    Verdict                   the verdict on one answer
    Region, Certificate       the region where answers are admitted, and its certified accuracy
    Policy, Conversations     what was calibrated: how answers are drawn, and to which conversations
    Representation            the parts that make up a state
    BundleError, CalibrationError, EngineError

These names are the public API; docs/python.md has an example of each. Everything else in this package
(`candor.app`, `candor.sdm`, ...) is internal and may change with any release.

Importing `candor` loads no heavy module: each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Bundle",
    "BundleError",
    "Calibrated",
    "CalibrationError",
    "Certificate",
    "Conversations",
    "EngineError",
    "Model",
    "Policy",
    "Record",
    "Region",
    "Representation",
    "Verdict",
    "Verdicts",
    "calibrate",
    "judge",
    "load_bundle",
    "read_records",
]

_HOMES = {
    "candor.calibrating": ("Calibrated", "calibrate"),
    "candor.calibration.data": ("Record",),
    "candor.calibration.errors": ("CalibrationError",),
    "candor.engine.base": ("EngineError", "Representation"),
    "candor.judging": ("Verdicts", "judge"),
    "candor.language_model": ("Model",),
    "candor.model_store.bundle": ("Bundle", "load_bundle"),
    "candor.model_store.errors": ("BundleError",),
    "candor.policy.certificate": ("Certificate",),
    "candor.policy.conversation": ("Conversations",),
    "candor.policy.decision": ("Verdict",),
    "candor.policy.policy": ("Policy",),
    "candor.records": ("read_records",),
    "candor.sdm.region": ("Region",),
}
"""The module of each name, repeated for lazy loading at run time (PEP 562)."""

if TYPE_CHECKING:
    from candor.calibrating import Calibrated, calibrate
    from candor.calibration.data import Record
    from candor.calibration.errors import CalibrationError
    from candor.engine.base import EngineError, Representation
    from candor.judging import Verdicts, judge
    from candor.language_model import Model
    from candor.model_store.bundle import Bundle, load_bundle
    from candor.model_store.errors import BundleError
    from candor.policy.certificate import Certificate
    from candor.policy.conversation import Conversations
    from candor.policy.decision import Verdict
    from candor.policy.policy import Policy
    from candor.records import read_records
    from candor.sdm.region import Region
else:

    def __getattr__(name: str) -> object:
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
            )
        value: object = getattr(import_module(home), name)
        globals()[name] = value  # the next access finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
