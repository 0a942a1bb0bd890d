"""One update of the world model, its critics and its policy prior (IQ-MPC, eq. 11-14).

`iq_update_reference` says what it computes, on draws given. `FusedUpdate` computes it in C++ in one
call, forward, backward, clipping, Adam, target critics and average, in the parameters' own memory;
its draws are functions of a seed and the update's number. `learner.mode` chooses
(`iqmpc.learner`).
"""

from __future__ import annotations

from iqmpc.kernels.iq_update.cpu import METRICS, FusedUpdate
from iqmpc.kernels.iq_update.reference import iq_update_reference
from iqmpc.kernels.iq_update.types import Rows, UpdateSettings, UpdateState

__all__ = ["METRICS", "FusedUpdate", "Rows", "UpdateSettings", "UpdateState", "iq_update_reference"]
