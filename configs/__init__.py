"""Hydra groups: `task`, `model`, `planner`, `learner`, `preset`. The schema is `iqmpc.config`."""
