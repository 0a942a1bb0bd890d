"""Who demonstrates: trained agents, others' policies, controllers by hand; and the recording."""

from iqmpc.demonstrators.recording import (
    DEMONSTRATORS,
    AgentPolicy,
    Demonstrator,
    Policy,
    record,
)

__all__ = ["DEMONSTRATORS", "AgentPolicy", "Demonstrator", "Policy", "record"]
