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
