"""The world model in the layout of the Triton kernels. Plain torch: does not import Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from iqmpc.kernels import layers as reference
from iqmpc.kernels.triton_tiles import power_of_two
from iqmpc.kernels.weights import Layer, Weights, layer_tensors, map_layers

PAD = 64  # rows and columns of packed matrices come in multiples of this
VECTORS = 5  # rows of a layer's vectors: bias, gamma, beta, a head's last layer, its bias
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


class PackedLayer(NamedTuple):
    """Where a layer lies. Of the critics' layers, the first critic; the others follow it."""

    weight: int  # in `matrices`: [outputs, inputs]
    inputs: int  # padded; of a first layer, those from the latent
    outputs: int  # padded
    action_weight: int  # in `matrices`: [outputs, actions], of a first layer; else 0
    vectors: int  # in `vectors`: [VECTORS, outputs]
    features: int  # outputs without padding: what LayerNorm divides by


class TritonWeights:
    """A read-only copy of a world model for the Triton kernels, made once and used often.

    `precision` is that of matrix products: "float32" (three tf32 products a product, so that
    float32's tolerance holds), "tf32" (one product, three decimal digits) or "bf16"; sums,
    LayerNorm, softmax and scores are float32. The copy lies where the weights are.

    Packing takes the mean over a layer's outputs out of its weights and bias where a LayerNorm
    would subtract it. SimNorm's groups are padded to a power of two.

    An encoder other than linear layers with LayerNorm, such as that of images, is not packed:
    `encoder` is then empty, and `encode` runs it in torch.

    Raises `ValueError` for a model that is not three layers each of dynamics, policy, critics and
    termination head, where there is one, or whose SimNorm groups have more than 64 members.
    """

    def __init__(self, weights: Weights, *, precision: str = "float32"):
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")
        reason = unfit(weights)
        if reason is not None:
            raise ValueError(reason)
        self.precision, self.dtype = precision, PRECISIONS[precision]
        self.product = "tf32x3" if precision == "float32" else "tf32"  # of float32 operands
        self.device = weights.dynamics[0].weight.device
        self.obs_shape, self.action_dim = weights.obs_shape, weights.action_dim
        self.latent_dim, self.num_critics = weights.latent_dim, weights.num_critics
        self.log_std_min, self.log_std_max = weights.log_std_min, weights.log_std_max
        self.actions = max(16, power_of_two(self.action_dim))  # padded
        self.group = power_of_two(weights.simnorm_dim)
        self.simnorm_dim = weights.simnorm_dim
        groups = self.latent_dim // self.simnorm_dim
        # A padded latent feature is v of group g at g * group + v.
        member = torch.arange(self.latent_dim, device=self.device)
        self._latent: Tensor | slice = slice(0, self.latent_dim)
        if self.group != self.simnorm_dim:
            group = member // self.simnorm_dim
            self._latent = group * self.group + member % self.simnorm_dim
        self.latent_size = groups * self.group
        # μ_j and log σ_j are neighbours, so that the kernel finds both in one block of columns.
        self._pairs = torch.arange(2 * self.action_dim, device=self.device)
        self._pairs = self._pairs % self.action_dim * 2 + self._pairs // self.action_dim

        self._matrix_size = self._vector_size = 0
        self.encoder: tuple[PackedLayer, ...] = ()
        if all(x.gamma is not None and x.weight.dim() == 2 for x in weights.encoder):
            self.encoder = self._place(weights.encoder, self.obs_shape[0], self.latent_size)
        self.dynamics = self._place(
            weights.dynamics, self.latent_size, self.latent_size, actions=True)
        self.policy = self._place(weights.policy, self.latent_size, 2 * self.action_dim)
        self.critics = self._place(weights.critics[:-1], self.latent_size, None, actions=True)
        self.termination = self._place(weights.termination[:-1], self.latent_size, None)
        self.width = max(x.outputs for x in (
            *self.encoder, *self.dynamics, *self.policy, *self.critics, *self.termination))
        # The kernels' step through a product: 128 bytes, and whole groups of SimNorm.
        self.block = max(self.group, 64 if precision == "bf16" else 32)
        self.slots = power_of_two(self.width // PAD)
        self.matrices = torch.zeros(self._matrix_size, dtype=self.dtype, device=self.device)
        self.vectors = torch.zeros(self._vector_size, device=self.device)
        unpacked = () if self.encoder else weights.encoder
        self.encoder_layers, self.policy_layers = (
            map_layers(lambda t: t.detach().to(torch.float32, copy=True), x)
            for x in (unpacked, weights.policy))
        self.tables: dict[object, object] = {}  # the rollout's, made once for these sizes
        if self.group != self.simnorm_dim:  # a padding member weighs exp(-inf)
            for packed in (*self.encoder[-1:], self.dynamics[2]):
                beta = self._vectors(packed)[2]
                beta[:self.latent_size] = -torch.inf
                beta[self._latent] = 0.0
        self.refresh(weights)

    @torch.no_grad()
    def refresh(self, weights: Weights) -> None:
        """Copy `weights`, of the same sizes, into the same memory: captured graphs stay valid."""
        for part, layers, first, last in (
            (self.encoder, weights.encoder[:len(self.encoder)], None, self._latent),
            (self.dynamics, weights.dynamics, self._latent, self._latent),
            (self.policy, weights.policy, self._latent, self._pairs),
            (self.critics, weights.critics[:2], self._latent, None),
            (self.termination, weights.termination[:2], self._latent, None),
        ):
            for i, (packed, layer) in enumerate(zip(part, layers, strict=True)):
                self._pack(packed, layer, first if i == 0 else None,
                           last if i == len(part) - 1 else None)
        self._pack_head(self.critics[1], weights.critics[-1], self.num_critics)
        if self.termination:
            self._pack_head(self.termination[1], weights.termination[-1])
        kept = layer_tensors(self.encoder_layers) + layer_tensors(self.policy_layers)
        unpacked = () if self.encoder else weights.encoder
        for t, s in zip(kept, layer_tensors(unpacked) + layer_tensors(weights.policy), strict=True):
            t.copy_(s)

    def encode(self, obs: Tensor) -> Tensor:  # [E, ...] -> [E, latent_size]
        """z_0 in the kernels' order, float32, by the encoder that is not packed."""
        encoder = Weights(self.encoder_layers, (), (), (), self.simnorm_dim, 0.0, 0.0)
        return self.latents(reference.encode(encoder, obs))

    def as_policy(self) -> Weights:
        """The policy alone, in float32, for `iqmpc.kernels.layers`."""
        return Weights((), (), self.policy_layers, (), self.simnorm_dim, self.log_std_min,
                       self.log_std_max)

    def latents(self, z: Tensor) -> Tensor:  # [E, Z] -> [E, latent_size]
        """z in the kernels' order of features."""
        if isinstance(self._latent, slice):
            return z.contiguous()
        return z.new_zeros(z.shape[0], self.latent_size).index_copy_(1, self._latent, z)

    def _place(self, layers: tuple[Layer, ...], inputs: int, outputs: int | None, *,
               actions: bool = False) -> tuple[PackedLayer, ...]:
        """Memory for a stack of layers; outputs: of its last one, None for its own; actions:
        whether the first one takes them beside its inputs."""
        placed = []
        for i, layer in enumerate(layers):
            members = layer.weight.shape[0] if layer.weight.dim() == 3 else 1
            features = layer.weight.shape[-2]
            rows = padded(features if outputs is None or i + 1 < len(layers) else outputs)
            columns = padded(inputs)
            action = actions and i == 0
            weight, vectors = self._matrix_size, self._vector_size
            self._matrix_size += members * rows * columns
            action_weight = self._matrix_size if action else 0
            self._matrix_size += members * rows * self.actions * action
            self._vector_size += members * VECTORS * rows
            placed.append(PackedLayer(weight, columns, rows, action_weight, vectors, features))
            inputs = features
        return tuple(placed)

    def _vectors(self, packed: PackedLayer, *members: int) -> Tensor:
        shape = (*members, VECTORS, packed.outputs)
        return _view(self.vectors, packed.vectors, shape)

    def _pack_head(self, packed: PackedLayer, head: Layer, *members: int) -> None:
        """A last layer of one output, beside the vectors of the layer before it."""
        vectors = self._vectors(packed, *members)
        vectors[..., 3, :head.weight.shape[-1]] = head.weight[..., 0, :].float()
        vectors[..., 4, :1] = head.bias.float()

    def _pack(self, packed: PackedLayer, layer: Layer, columns: Tensor | slice | None,
              rows: Tensor | slice | None) -> None:
        """columns, rows: where inputs and outputs go; None: in their own order."""
        weight, bias = layer.weight.float(), layer.bias.float()
        if layer.gamma is not None:
            weight = weight - weight.mean(-2, keepdim=True)
            bias = bias - bias.mean(-1, keepdim=True)
        if rows is None:
            rows = slice(0, packed.features)
        inputs = self.latent_dim if packed.action_weight else weight.shape[-1]
        if columns is None:
            columns = slice(0, inputs)
        lead = weight.shape[:-2]
        matrix = _view(self.matrices, packed.weight, (*lead, packed.outputs, packed.inputs))
        matrix[..., rows, columns] = weight[..., :inputs].to(self.dtype)
        if packed.action_weight:
            matrix = _view(
                self.matrices, packed.action_weight, (*lead, packed.outputs, self.actions))
            matrix[..., rows, :self.action_dim] = weight[..., inputs:].to(self.dtype)
        vectors = self._vectors(packed, *lead)
        for row, value in enumerate((bias, layer.gamma, layer.beta)):
            if value is not None:
                vectors[..., row, rows] = value.float()


def padded(size: int) -> int:
    return -(-size // PAD) * PAD


def _view(buffer: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    return buffer[start:start + torch.Size(shape).numel()].view(shape)


def unfit(weights: Weights) -> str | None:
    """What the kernels cannot take in these weights, or None."""
    heads = ("policy", "critics", *(["termination"] if weights.termination else []))
    normed = dict(dynamics=(True, True, True)) | dict.fromkeys(heads, (True, True, False))
    for part, expected in normed.items():
        if tuple(x.gamma is not None for x in getattr(weights, part)) != expected:
            return (f"{part}: the triton backend takes three layers, LayerNorm on "
                    f"{'all' if all(expected) else 'the first two'}")
    if weights.critics[-1].weight.shape[-2] != 1 or weights.num_critics < 2:
        return "critics: expected at least 2, with one output each"
    if weights.termination and weights.termination[-1].weight.shape[-2] != 1:
        return "termination: expected one output"
    if weights.latent_dim % weights.simnorm_dim:
        return (f"simnorm_dim: must divide the latent size {weights.latent_dim}, got "
                f"{weights.simnorm_dim}")
    if weights.simnorm_dim > PAD:
        return f"simnorm_dim: the triton backend takes at most {PAD}, got {weights.simnorm_dim}"
    return None
