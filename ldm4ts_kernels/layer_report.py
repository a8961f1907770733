"""The report of `accelerate_attention`: a row a layer, laid out as a table."""

from collections.abc import Mapping
from typing import NamedTuple

from ldm4ts_kernels.plugged_layer import PluggedLayer, Policy

Reasons = Mapping[str, tuple[str, ...]]


class ReportRow(NamedTuple):
    """One attention layer. A layer that is not plugged has no policy."""

    layer: str
    policy: Policy | None
    shape: tuple[int, ...] | None  # (B, H, Q, K, D) of the last eager call
    served_by: str | None
    reasons: Reasons  # of the backends before it in the chain; or, under "", why it is not plugged

    @classmethod
    def of(cls, layer: PluggedLayer) -> "ReportRow":
        """Return the row of a plugged layer, as its last eager call left it."""
        reasons: dict[str, tuple[str, ...]] = {}
        explanation = layer.explanation
        if explanation is not None:
            for name, against in explanation.reasons.items():
                if name == explanation.chosen:
                    break
                reasons[name] = against
        return cls(layer.name, layer.policy, layer.shape, layer.served_by, reasons)


class Report(tuple[ReportRow, ...]):
    """The rows; `str` and `print` lay them out, with reasons that layers share said once."""

    def __str__(self) -> str:
        notes: dict[str, str] = {}
        cells = [("layer", "precision", "(B, H, Q, K, D)", "served by", "because")]
        for row in self:
            note = _note(row.reasons)
            cells.append(
                (
                    row.layer,
                    row.policy.precision if row.policy else "-",
                    str(row.shape) if row.shape else "-",
                    row.served_by or ("no eager call yet" if row.policy else "not plugged"),
                    notes.setdefault(note, f"[{len(notes) + 1}]") if note else "",
                )
            )
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        return "\n".join([*table, *(f"{number} {note}" for note, number in notes.items())])


def _note(reasons: Reasons) -> str:
    return "\n    ".join(
        f"{name}: {'; '.join(against)}" if name else "; ".join(against)
        for name, against in reasons.items()
    )
