"""Models that Stable-Baselines3 saved act here as they do there; nothing in them is unpickled."""

import base64
import copy
import io
import json
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch

from iqmpc.demonstrators.sb3 import Sb3Policy
from iqmpc.demos import DemonstrationError

sb3 = pytest.importorskip("stable_baselines3")
contrib = pytest.importorskip("sb3_contrib")

NARROW = {"net_arch": [16, 8]}


def saved(folder, name, **options):
    """An untrained model for Pendulum-v1 (O = 3, A = 1, actions in [-2, 2]), and its file."""
    module = sb3 if hasattr(sb3, name) else contrib
    options = copy.deepcopy({"policy_kwargs": NARROW, **options})  # SB3 adds to it
    model = getattr(module, name)("MlpPolicy", "Pendulum-v1", device="cpu", seed=1, **options)
    model.save(folder / "model.zip")
    return model, folder / "model.zip"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SAC", {}),
        ("SAC", {"use_sde": True}),
        ("SAC", {"policy_kwargs": {"net_arch": []}}),
        ("SAC", {"policy_kwargs": {**NARROW, "activation_fn": torch.nn.Tanh}}),
        ("TQC", {}),
        ("TD3", {}),
        ("DDPG", {}),
        ("PPO", {}),
        ("PPO", {"use_sde": True}),
        ("PPO", {"policy_kwargs": {**NARROW, "activation_fn": torch.nn.ELU}}),
        ("A2C", {}),
    ],
)
def test_the_action_is_the_models_own(tmp_path, name, options):
    model, path = saved(tmp_path, name, **options)
    policy = Sb3Policy(path, 3, 1)
    # large observations reach the ends of the range, where tanh and clipping differ
    obs = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * 5
    expected = model.predict(obs, deterministic=True)[0] / 2
    found = np.array([policy(row) for row in obs])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.std() > 1e-3 and found.dtype == np.float32


def rewritten(path, change=lambda data: None, policy=None):
    """The model's zip with its settings changed in place, or another policy.pth."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    settings = json.loads(members["data"])
    change(settings)
    members["data"] = json.dumps(settings).encode()
    if policy is not None:
        members["policy.pth"] = policy
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_what_is_pickled_inside_is_never_run(tmp_path):
    """Every pickled setting is a bomb: the model is read as if they were not there."""
    model, path = saved(tmp_path, "PPO", policy_kwargs={**NARROW, "activation_fn": torch.nn.ReLU})
    target = tmp_path / "touched"
    bomb = base64.b64encode(pickle.dumps(Bomb(target))).decode()
    armed = []

    def arm(settings):
        for key, value in settings.items():
            if isinstance(value, dict) and ":serialized:" in value:
                value[":serialized:"] = bomb
                armed.append(key)

    policy = Sb3Policy(rewritten(path, arm), 3, 1)
    assert "policy_kwargs" in armed and "action_space" in armed
    obs = np.float32([1.0, -1.0, 0.5])
    np.testing.assert_allclose(
        policy(obs), model.predict(obs, deterministic=True)[0] / 2, atol=1e-6
    )
    assert not target.exists()


def test_a_bomb_for_weights_is_refused(tmp_path):
    _, path = saved(tmp_path, "SAC")
    target = tmp_path / "touched"
    for weights in (Bomb(target), {"actor.mu.weight": Bomb(target)}):
        content = io.BytesIO()
        torch.save(weights, content)
        for policy in (content.getvalue(), pickle.dumps(weights)):
            with pytest.raises(DemonstrationError, match="no model as Stable-Baselines3 saves"):
                Sb3Policy(rewritten(path, policy=policy), 3, 1)
    assert not target.exists()


def test_sizes_must_be_the_tasks(tmp_path):
    _, path = saved(tmp_path, "SAC")
    message = "the policy has 3 observations and 1 actions, the task 24 and 6"
    with pytest.raises(DemonstrationError, match=message):
        Sb3Policy(path, 24, 6)


def test_more_than_an_mlp_is_refused(tmp_path):
    _, path = saved(tmp_path, "CrossQ")
    with pytest.raises(DemonstrationError, match="its policy is more than an MLP: it has 'actor"):
        Sb3Policy(path, 3, 1)


def test_vecnormalize_is_refused_where_it_can_be_seen(tmp_path):
    _, path = saved(tmp_path, "SAC")
    statistics = tmp_path / "model" / "vecnormalize.pkl"
    statistics.parent.mkdir()
    statistics.touch()
    message = f"trained under VecNormalize, whose statistics are in a pickle ({statistics})"
    with pytest.raises(DemonstrationError, match=re.escape(message)):
        Sb3Policy(path, 3, 1)
    statistics.unlink()
    assert Sb3Policy(path, 3, 1)
    _, path = saved(tmp_path, "PPO")
    rewritten(path, lambda settings: settings.update(_last_original_obs={":type:": "ndarray"}))
    with pytest.raises(DemonstrationError, match="trained under VecNormalize"):
        Sb3Policy(path, 3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.update(policy_kwargs={"activation_fn": "<class 'evil.Act'>"}),
            "unknown activation 'Act'",
        ),
        (lambda s: s["action_space"].pop("low"), "its action space is no bounded Box"),
        (lambda s: s["action_space"].update(high="[inf]"), "its action space is no bounded Box"),
        (lambda s: s["action_space"].update(high="[1. 2.]"), "its action space is no bounded Box"),
        (lambda s: s.update(policy_kwargs=[1]), "policy_kwargs is no dictionary"),
        (lambda s: s.update(policy_kwargs={"squash_output": True}), "squash_output is not read"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, change, message):
    _, path = saved(tmp_path, "PPO")
    with pytest.raises(DemonstrationError, match=message):
        Sb3Policy(rewritten(path, change), 3, 1)


def test_weights_that_do_not_fit(tmp_path):
    _, path = saved(tmp_path, "SAC")
    for weights, message in (
        ({}, "it has no actor of SAC, TQC, TD3, DDPG, PPO or A2C"),
        (
            {"actor.log_std.weight": torch.zeros(1), "actor.mu.weight": torch.zeros(1, 3)},
            "actor.mu.weight and actor.mu.bias make no linear layer",
        ),
        (
            {
                "actor.log_std.weight": torch.zeros(1),
                "actor.mu.weight": torch.zeros(1, 3),
                "actor.mu.bias": torch.zeros(1),
                "actor.latent_pi.0.weight": torch.zeros(8, 4),
                "actor.latent_pi.0.bias": torch.zeros(8),
            },
            "does not take what the layer before gives",
        ),
        ({"a": 1}, "is not what Stable-Baselines3 saves"),
        ([1], "is not what Stable-Baselines3 saves"),
    ):
        content = io.BytesIO()
        torch.save(weights, content)
        with pytest.raises(DemonstrationError, match=message):
            Sb3Policy(rewritten(path, policy=content.getvalue()), 3, 1)


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "model.zip"
    with pytest.raises(DemonstrationError, match="model.zip: cannot be read: No such file"):
        Sb3Policy(path, 3, 1)
    path.write_bytes(b"no zip")
    with pytest.raises(DemonstrationError, match="no model as Stable-Baselines3 saves them"):
        Sb3Policy(path, 3, 1)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "[" * 100_000)
        archive.writestr("policy.pth", b"")
    with pytest.raises(DemonstrationError, match="no model as Stable-Baselines3 saves them"):
        Sb3Policy(path, 3, 1)
    _, path = saved(tmp_path, "TD3")
    content = path.read_bytes()
    for offset in np.random.default_rng(0).integers(len(content), size=60):
        spoilt = bytearray(content)
        spoilt[offset] ^= 0xFF
        path.write_bytes(spoilt)
        try:
            Sb3Policy(path, 3, 1)
        except DemonstrationError as error:
            assert "model.zip: " in str(error)


def test_small_zips_that_unpack_to_much_are_refused(tmp_path):
    """Deflated zeros, in the model's zip and in that of its weights, and one number as many."""
    _, path = saved(tmp_path, "SAC")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(2**27))
    with pytest.raises(DemonstrationError, match="its zip unpacks to 134217728 bytes, expected"):
        Sb3Policy(rewritten(path, policy=inner.getvalue()), 3, 1)
    content = io.BytesIO()
    torch.save({"actor.mu.weight": torch.zeros(1).expand(10**6, 10**3)}, content)
    with pytest.raises(DemonstrationError, match="4000000000 bytes of weights are claimed by a"):
        Sb3Policy(rewritten(path, policy=content.getvalue()), 3, 1)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", b" " * 2**27)
        archive.writestr("policy.pth", b"")
    with pytest.raises(DemonstrationError, match="its zip unpacks to 134217728 bytes, expected"):
        Sb3Policy(path, 3, 1)
