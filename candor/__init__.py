"""Candor: language model answers that say whether they can be relied on.

    load_bundle, Bundle       a calibrated model, from its directory
    judge, Verdicts           verdicts on many answers, from their states
    Model                     a language model in this process: texts to states, and the verdict on one answer
    calibrate, Calibrated     a bundle from states and labels
    Verdict                   the verdict on one answer
    Region, Certificate       where answers are admitted, and what was certified of them
    Policy, Conversations     what was calibrated: how answers are drawn, and to which conversations
    Representation            what a state is made of
    BundleError, CalibrationError, EngineError

These names are the public API; docs/python.md has an example of each. Whatever else lies in this package
(`candor.app`, `candor.sdm`, ...) is internal and may change with any release.

Importing `candor` imports nothing heavy: a name is loaded when it is first used.
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
    "Region",
    "Representation",
    "Verdict",
    "Verdicts",
    "calibrate",
    "judge",
    "load_bundle",
]

_HOMES = {
    "candor.calibrating": ("Calibrated", "calibrate"),
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
    "candor.sdm.region": ("Region",),
}
"""The module of each name, once more for when the program runs (PEP 562)."""

if TYPE_CHECKING:
    from candor.calibrating import Calibrated, calibrate
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
    from candor.sdm.region import Region
else:

    def __getattr__(name: str) -> object:
        home = next((module for module, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
            )
        value: object = getattr(import_module(home), name)
        globals()[name] = value  # found at once the next time
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
