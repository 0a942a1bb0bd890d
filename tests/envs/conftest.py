import numpy as np
import pytest


@pytest.fixture
def episode():
    """(env, seed, actions) -> observations [T+1, O], rewards, and what the last step said."""

    def run(env, seed, actions):
        obs, _ = env.reset(seed=seed)
        rows, rewards = [obs], []
        for action in actions:
            obs, reward, terminated, truncated, info = env.step(action)
            rows.append(obs)
            rewards.append(reward)
        return np.array(rows), rewards, terminated, truncated, info

    return run
