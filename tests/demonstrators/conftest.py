"""What the tests of several demonstrators share."""

import pytest


@pytest.fixture
def solves():
    """solves(env, policy, seed): whether the episode ends in success."""

    def solves(env, policy, seed):
        obs, _ = env.reset(seed=seed)
        done = False
        while not done:
            obs, _, _, done, info = env.step(policy(obs))
        return info["success"]

    return solves
