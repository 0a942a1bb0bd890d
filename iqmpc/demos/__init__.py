"""Demonstration sets: one in-memory type, one reader per file format, and their checks."""

from iqmpc.demos.demonstrations import Demonstrations
from iqmpc.demos.types import DemonstrationError, Facts

__all__ = ["DemonstrationError", "Demonstrations", "Facts"]
