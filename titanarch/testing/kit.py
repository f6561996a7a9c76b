"""All checks of a component on one process, by name, and what they found."""

import traceback
from collections.abc import Mapping

import torch

from titanarch.config.errors import ConfigError
from titanarch.testing import behaviour, declarations
from titanarch.testing.findings import Check, Finding, Inapplicable, Wrong
from titanarch.testing.subject import Stack, Subject

CHECKS: Mapping[str, Check] = {
    "declared": declarations.declared,
    "names": declarations.names,
    "initial weights": declarations.filled,
    "seed": declarations.seeded,
    "parameters": declarations.parameters,
    "flops": declarations.flops,
    "causal": behaviour.causal,
    "packed": behaviour.packed,
    "gradients": behaviour.gradients,
    "deterministic": behaviour.deterministic,
    "bf16": behaviour.low_precision,
    "half of the heads": behaviour.heads,
    "decoding": behaviour.decoding,
    "states": behaviour.states,
}
"""In the order of a report. What needs several processes is in ``titanarch.testing.divided``."""


def run_check(subject: Subject, name: str) -> Finding:
    """One check. ConfigError where the component is unknown or refuses its table."""
    try:
        return Finding(subject.name, name, "ok", CHECKS[name](subject))
    except Inapplicable as reason:
        return Finding(subject.name, name, "-", str(reason))
    except Wrong as wrong:
        return failure(subject, name, str(wrong))
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 (a component may raise anything, and the other checks go on)
        return failure(subject, name, f"{subject.name}: {raised(error)}")


def run_checks(subject: Subject) -> list[Finding]:
    """All checks on one process; one finding where the component cannot be built. ConfigError as from ``run_check``."""
    try:
        with torch.device("meta"):
            Stack(subject)
    except ConfigError:
        raise
    except ValueError as error:  # how sizes are refused in a validator, too
        raise ConfigError(f"{subject.name}: {error}") from error
    except Exception as error:  # noqa: BLE001 (as above)
        return [failure(subject, "build", f"{subject.name}: {raised(error)}")]
    return [run_check(subject, name) for name in CHECKS]


def failure(subject: Subject, check: str, text: str) -> Finding:
    """A failed check, or a known difference where the component's card gives its reason."""
    card = subject.component.card
    reason = None if card is None else card.differs.get(check)
    return Finding(subject.name, check, "FAIL", text) if reason is None else Finding(subject.name, check, "known", f"{reason} ({text})")


def raised(error: Exception) -> str:
    """An exception in a line: what, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"raised {type(error).__name__}: {error}{where}"
