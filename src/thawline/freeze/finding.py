"""One thing that the doctor says about a model under a plan, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is, or will go, wrong (or that looks wrong and is not: severity info).

    code:  a short name that stays; names: the tensors or modules concerned; fix: what to do
    """

    code: str
    severity: Severity
    what: str
    names: tuple[str, ...] = ()
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        names = ", ".join(self.names[:_SHOWN]) + (" ..." if len(self.names) > _SHOWN else "")
        text = f"{self.severity}: {self.what}" + (f": {names}" if names else "")
        return f"{text}\n  fix: {self.fix}" if self.fix else text
