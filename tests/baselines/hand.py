"""The networks of baselines by hand, in NumPy and float64."""

import numpy as np


def hand_mlp(part, x, member=None):
    """Linear, LayerNorm, Mish, twice, then Linear: x [N, I] -> [N, O]; of one member of a stack."""
    x = np.asarray(x, np.float64)
    for index, linear in enumerate(part):
        tensors = (linear.weight, linear.bias, linear.gamma, linear.beta)
        weight, bias, gamma, beta = (
            None if t is None else t.detach().double().numpy()[... if member is None else member]
            for t in tensors
        )
        x = x @ weight.T + bias
        if index < len(part) - 1:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * gamma + beta
            x = x * np.tanh(np.log1p(np.exp(x)))
    return x


def hand_q(critics, obs, action):
    """Q of both critics on rows, [2, N]."""
    x = np.concatenate([np.asarray(obs), np.asarray(action)], -1)
    return np.array([hand_mlp(critics, x, member)[:, 0] for member in range(2)])


def hand_policy(model, obs, noise):
    """a = tanh(μ + σ ε) and the density's logarithm, log σ in [-5, 2]."""
    mean, x = np.split(hand_mlp(model.policy, obs), 2, -1)
    log_std = -5 + 0.5 * 7 * (np.tanh(x) + 1)
    noise = np.asarray(noise, np.float64)
    action = np.tanh(mean + np.exp(log_std) * noise)
    density = np.exp(-0.5 * noise**2) / (np.exp(log_std) * np.sqrt(2 * np.pi)) / (1 - action**2)
    return action, np.log(density).sum(-1)
