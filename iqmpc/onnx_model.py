"""Encoder and policy prior as an ONNX model, for who only wants the prior."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from torch import Tensor

from iqmpc.errors import ConfigError
from iqmpc.kernels.layers import CONVOLUTIONS
from iqmpc.kernels.weights import Layer, Weights

_OPSET = 18  # Mish
_EPS = 1e-5


class _Graph:
    """Nodes one behind the other; every method returns the name of what it computes."""

    def __init__(self, onnx: Any):
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor | np.ndarray) -> str:
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().float().numpy()
        name = f"c{len(self.constants)}"
        self.constants.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, operation: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"v{len(self.nodes)}"
        node = self._onnx.helper.make_node(operation, list(inputs), [name], **attributes)
        self.nodes.append(node)
        return name

    def linear(self, layer: Layer, x: str, **how: Any) -> str:
        weight, bias = self.constant(layer.weight), self.constant(layer.bias)
        if layer.gamma is None or layer.beta is None:
            return self.add("Gemm", x, weight, bias, transB=1, **how)
        y = self.add("Gemm", x, weight, bias, transB=1)
        gamma, beta = self.constant(layer.gamma), self.constant(layer.beta)
        return self.add("LayerNormalization", y, gamma, beta, axis=-1, epsilon=_EPS, **how)

    def mlp(self, layers: tuple[Layer, ...], x: str) -> str:
        for layer in layers[:-1]:
            x = self.add("Mish", self.linear(layer, x))
        return self.linear(layers[-1], x)

    def convolve(self, layers: tuple[Layer, ...], images: str) -> str:
        x = self.add("Cast", images, to=self._onnx.TensorProto.FLOAT)
        x = self.add("Div", x, self.constant(np.float32(255).reshape(1)))
        x = self.add("Sub", x, self.constant(np.float32(0.5).reshape(1)))
        for index, (layer, (_, stride)) in enumerate(zip(layers, CONVOLUTIONS, strict=False)):
            x = self.add("Relu", x) if index else x
            weight, bias = self.constant(layer.weight), self.constant(layer.bias)
            x = self.add("Conv", x, weight, bias, strides=[stride, stride])
        x = self.add("Flatten", x, axis=1)
        for layer in layers[len(CONVOLUTIONS) :]:
            x = self.linear(layer, x)
        return x

    def simnorm(self, x: str, group: int, name: str) -> str:
        grouped = self.add("Reshape", x, self.constant(np.array([0, -1, group], np.int64)))
        shares = self.add("Softmax", grouped, axis=-1)
        return self.add("Reshape", shares, self.constant(np.array([0, -1], np.int64)), name=name)


def prior_model(weights: Weights, metadata: dict[str, str]) -> bytes:
    """An ONNX model (opset 18) of h and π: obs [N, O], or uint8 [N, 3C, 64, 64], -> z [N, Z], the
    Gaussian's mean [N, A] and log_std [N, A] before squashing, and action [N, A] = tanh(mean).

    Raises `ConfigError` where the package onnx is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError("ONNX models need the package onnx: pip install 'iqmpc[onnx]'")
    import onnx

    g, helper, types = _Graph(onnx), onnx.helper, onnx.TensorProto
    images = weights.encodes_images
    x = g.convolve(weights.encoder, "obs") if images else g.mlp(weights.encoder, "obs")
    z = g.simnorm(x, weights.simnorm_dim, "z")
    heads, actions = g.mlp(weights.policy, z), weights.action_dim
    sizes = g.constant(np.array([actions, actions], np.int64))
    g.nodes.append(helper.make_node("Split", [heads, sizes], ["mean", "raw"], axis=-1))
    low, high = weights.log_std_min, weights.log_std_max
    half = g.constant(np.array([0.5 * (high - low)], np.float32))
    scaled = g.add("Mul", g.add("Tanh", "raw"), half)
    middle = g.constant(np.array([0.5 * (high + low)], np.float32))
    g.add("Add", scaled, middle, name="log_std")
    g.add("Tanh", "mean", name="action")

    def value(name: str, dtype: int, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, dtype, ["N", *shape])

    observed = value("obs", types.UINT8 if images else types.FLOAT, *weights.obs_shape)
    outputs = [value("z", types.FLOAT, weights.latent_dim)]
    outputs += [value(name, types.FLOAT, actions) for name in ("mean", "log_std", "action")]
    graph = helper.make_graph(g.nodes, "prior", [observed], outputs, g.constants)
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], producer_name="iqmpc", ir_version=8)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()
