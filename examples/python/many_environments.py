"""One agent in several environments, planned in one call (extra `dmcontrol`).

python examples/python/many_environments.py --steps 500
"""

import argparse

import numpy as np

import iqmpc

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--agent", default="packaged:walker-walk")
    given = parser.parse_args()
    envs = [iqmpc.make_env("walker-walk", seed=seed) for seed in range(4)]
    agent = iqmpc.Agent.load(given.agent, num_envs=len(envs))
    obs = np.stack([env.reset()[0] for env in envs])
    total = np.zeros(len(envs))
    for _ in range(given.steps):  # 500 are an episode
        stepped = [env.step(action) for env, action in zip(envs, agent.act(obs), strict=True)]
        obs = np.stack([step[0] for step in stepped])
        total += [step[1] for step in stepped]
    print("returns", *np.round(total, 1))
