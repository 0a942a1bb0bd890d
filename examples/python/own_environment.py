"""An environment and data of one's own: demonstrate, train, evaluate, decode rewards.

python examples/python/own_environment.py --steps 3000
"""

import argparse

import gymnasium as gym
import numpy as np

import iqmpc


class Reach(gym.Env):
    """A mass on a plane is pushed to a goal: it observes place, velocity and the way to go."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (6,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.goal = self.np_random.uniform(-1, 1, (2, 2))
        self.velocity, self.steps = np.zeros(2), 0
        return self.observe(), {}

    def step(self, action):
        self.velocity = 0.8 * self.velocity + 0.02 * action
        self.place = self.place + self.velocity
        self.steps += 1
        left = np.linalg.norm(self.goal - self.place)
        truncated = self.steps >= 60
        return self.observe(), float(np.exp(-5 * left)), False, truncated, {"success": left < 0.1}

    def observe(self):
        return np.concatenate([self.place, self.velocity, self.goal - self.place], dtype=np.float32)


def demonstrate(env, episodes):
    """Episodes of a controller; yours may come from a log or a person."""
    found = []
    for seed in range(episodes):
        obs, actions, rewards, truncated = [env.reset(seed=seed)[0]], [], [], False
        while not truncated:
            way, velocity = env.goal - env.place, env.velocity
            actions.append(np.clip(5 * way - 20 * velocity, -1, 1).astype(np.float32))
            seen, reward, _, truncated, info = env.step(actions[-1])
            obs.append(seen)  # one row more than actions
            rewards.append(reward)
        found.append(
            iqmpc.Episode(
                np.array(obs, np.float32),
                np.array(actions, np.float32),
                np.array(rewards, np.float32),  # for reports: nothing is learnt from them
                success=bool(info["success"]),
            )
        )
    return iqmpc.Demonstrations("reach", tuple(found), {"demonstrator": "a PD controller"})


def train(run, steps, *settings):
    """A run on the environment above; returns its summary."""
    config = iqmpc.compose(
        [
            "task.name=reach",
            "task.suite=own",
            "task.episode_length=60",
            "train.random_steps=300",
            f"train.steps={steps}",
            *settings,
        ]
    )
    return iqmpc.Trainer(config, Reach(), demonstrate(Reach(), 20), run=run).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--run", default="runs/reach")
    parser.add_argument("settings", nargs="*", help="as of iqmpc train")
    given = parser.parse_args()
    summary = train(given.run, given.steps, *given.settings)
    print(f"return {summary['return_mean']:.1f}, demonstrator {summary['demonstrator_return']:.1f}")

    agent, env = iqmpc.Agent.load(given.run), Reach()
    result = iqmpc.evaluate(agent, env, episodes=5, seed=1)
    print(f"success {result.success_rate:.2f}")
    episode = result.episodes[0]
    decoded = agent.decode_reward(
        episode.observations[:-1], episode.actions, episode.observations[1:]
    )
    print(f"implied reward, first and last step: {decoded[0]:.2f} {decoded[-1]:.2f}")
