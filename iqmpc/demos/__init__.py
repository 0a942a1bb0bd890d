"""Demonstration sets: one in-memory type, one reader per file format, and their checks."""

from iqmpc.demos.demonstrations import Demonstrations
from iqmpc.demos.types import DemonstrationError, Episode, Facts

__all__ = ["DemonstrationError", "Demonstrations", "Episode", "Facts"]
