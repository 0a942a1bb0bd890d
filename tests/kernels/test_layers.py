"""The encoder of images and the random shift against what they are said to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iqmpc import WorldModel
from iqmpc.config import ModelConfig
from iqmpc.kernels import layers


@pytest.mark.parametrize(("channels", "latent"), [(9, 16), (3, 512)])
def test_modules_of_torch_encode_the_same(channels, latent):
    model = WorldModel((channels, 64, 64), 2, ModelConfig(hidden_dim=8, latent_dim=latent)).double()
    parts: list[nn.Module] = []
    for kernel, stride in ((7, 2), (5, 2), (3, 2), (3, 1)):
        parts += [nn.LazyConv2d(32, kernel, stride), nn.ReLU()]
    parts[-1] = nn.Flatten()  # ReLU between the convolutions, not after the last
    if latent != 512:
        parts.append(nn.Linear(512, latent))
    plain = nn.Sequential(*parts).double()
    images = torch.randint(0, 256, (2, 3, channels, 64, 64), dtype=torch.uint8)
    flat = images.flatten(0, 1).double() / 255 - 0.5
    plain(flat)
    modules = [m for m in plain if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(modules) == len(model.encoder)
    for module, part in zip(modules, model.encoder, strict=True):
        nn.init.normal_(part.bias, std=0.1)
        module.load_state_dict({"weight": part.weight, "bias": part.bias})
    expected = plain(flat).unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
    torch.testing.assert_close(model.encode(images), expected.unflatten(0, (2, 3)))
    torch.testing.assert_close(model.encode(images[0, 0]), expected[0])


@pytest.mark.parametrize(("lead", "size"), [((4, 3), (64, 64)), ((5,), (6, 9))])
def test_shifted_against_a_loop(lead, size):
    images = torch.randint(0, 256, (*lead, 2, *size), dtype=torch.uint8)
    shift = torch.randint(-3, 4, (*lead, 2))
    moved = layers.shifted(images, shift)
    assert moved.dtype == torch.uint8 and moved.shape == images.shape
    rows, columns = size
    for image, to, (down, right) in zip(
        images.flatten(0, -4), moved.flatten(0, -4), shift.flatten(0, -2).tolist(), strict=True
    ):
        for y in range(rows):
            for x in range(columns):
                source = min(max(y + down, 0), rows - 1), min(max(x + right, 0), columns - 1)
                assert torch.equal(to[:, y, x], image[:, source[0], source[1]])


def test_no_shift_is_the_image_itself():
    images = torch.randint(0, 256, (3, 9, 64, 64), dtype=torch.uint8)
    assert torch.equal(layers.shifted(images, torch.zeros(3, 2, dtype=torch.int64)), images)
