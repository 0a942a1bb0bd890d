"""`iqmpc doctor`: what can run here."""

from __future__ import annotations

from rich.console import Console


def doctor() -> None:
    """Versions, devices, and which kernel backends can run here and why the others cannot."""
    from iqmpc.doctor import report

    for table in report():
        Console().print(table)
