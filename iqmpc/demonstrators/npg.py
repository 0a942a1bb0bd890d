"""The policies that MyoSuite packages (natural policy gradient), without their training library."""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from iqmpc.demos.formats import legacy
from iqmpc.demos.types import DemonstrationError

# MyoSuite's id -> the seed of the packaged policy that solves the task most often, and the share of
# its own noise at which it still does.
CHOICES = {
    "myoHandKeyTurnFixed-v0": (1, 0.3),
    "myoHandObjHoldFixed-v0": (3, 0.2),
}


class GaussianPolicy:
    """a ~ N(μ(s), σ²), clipped to [-1, 1]; μ a tanh network on normalised observations.

    `noise` scales σ. Calls draw from `generator`.
    """

    def __init__(
        self,
        layers: Sequence[tuple[np.ndarray, ...]],
        shift: np.ndarray,
        scale: np.ndarray,
        out_shift: np.ndarray,
        out_scale: np.ndarray,
        log_std: np.ndarray,
        *,
        noise: float = 1.0,
        generator: np.random.Generator | None = None,
    ):
        self.layers, self.noise = layers, noise
        self.shift, self.scale = shift, scale
        self.out_shift, self.out_scale, self.std = out_shift, out_scale, np.exp(log_std)
        self.generator = generator or np.random.default_rng()

    def reset(self, env: gymnasium.Env | None = None) -> None:
        """Nothing is kept from step to step."""

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """obs [O] -> action float32 [A]."""
        x = (obs - self.shift) / (self.scale + 1e-8)
        for weight, bias in self.layers[:-1]:
            x = np.tanh(weight @ x + bias)
        weight, bias = self.layers[-1]
        mean = (weight @ x + bias) * self.out_scale + self.out_shift
        noise = self.noise * self.std * self.generator.standard_normal(len(mean))
        return np.clip(mean + noise, -1, 1).astype(np.float32)


def packaged(
    env_id: str, *, generator: np.random.Generator | None = None
) -> tuple[GaussianPolicy, dict[str, str]]:
    """The packaged policy for MyoSuite's `env_id`, and its provenance.

    Raises `DemonstrationError` where MyoSuite is missing or packages none that solves the task.
    """
    if env_id not in CHOICES:
        raise DemonstrationError(
            f"MyoSuite packages no policy that solves {env_id} (it does for: {', '.join(CHOICES)})"
        )
    seed, noise = CHOICES[env_id]
    found = importlib.util.find_spec("myosuite")
    if found is None or not found.submodule_search_locations:
        raise DemonstrationError(
            "MyoSuite's policies need the extra 'myosuite': pip install 'iqmpc[myosuite]'"
        )
    folder = Path(found.submodule_search_locations[0]) / "agents" / "baslines_NPG" / env_id
    paths = sorted(folder.glob(f"*/*,seed={seed}/iterations/best_policy.pickle"))
    if not paths:
        raise DemonstrationError(f"{folder} holds no policy of seed {seed}")
    policy = load(paths[0])
    policy.noise = noise
    if generator is not None:
        policy.generator = generator
    return policy, {
        "demonstrator": f"MyoSuite's packaged NPG policy for {env_id}, seed {seed}",
        "noise": f"{noise} of the policy's own",
    }


def load(path: Path) -> GaussianPolicy:
    """Read an mjrl policy file. Nothing that it names is imported or called; see `_Reader`.

    Raises `DemonstrationError` for a file that is none.
    """
    try:
        data = path.read_bytes()
        legacy.scan(data, {"NEWOBJ"})
        root = vars(_Reader(io.BytesIO(data)).load())
        network = vars(root["model"])
        modules = vars(network["_modules"]["fc_layers"])["_modules"].values()
        layers = [
            tuple(_float64(vars(m)["_parameters"][k]) for k in ("weight", "bias")) for m in modules
        ]
        affine = [_float64(network[k]) for k in ("in_shift", "in_scale", "out_shift", "out_scale")]
        log_std = _float64(root["log_std_val"])
    except Exception as error:  # a wrong pickle fails anywhere in the machine
        raise DemonstrationError(f"{path}: not an mjrl policy: {error}") from error
    return GaussianPolicy(layers, *affine, log_std=log_std)


def _float64(value: Any) -> np.ndarray:
    """Of an array or a number, which is what all of a policy's figures are."""
    value = value.value if isinstance(value, legacy.Array) else value
    if not isinstance(value, (np.ndarray, torch.Tensor, float)):
        raise ValueError(f"a {type(value).__name__} where there should be an array")
    return np.asarray(value, np.float64)


class _Object:
    """In the place of a module of the training library or of torch: attributes, no behaviour."""


class _Reader(pickle.Unpickler):
    """An unpickler that knows arrays, tensors and attributes, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is not admitted"
            ) from None


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any):
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    held = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    if min(offset, *size, *stride) < 0 or reach > held:  # torch would make it larger
        raise ValueError("a tensor beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


_NAMES: dict[tuple[str, str], Any] = {
    **legacy.ARRAYS,
    ("mjrl.policies.gaussian_mlp", "MLP"): _Object,
    ("mjrl.utils.fc_network", "FCNetwork"): _Object,
    ("torch.nn.modules.container", "ModuleList"): _Object,
    ("torch.nn.modules.linear", "Linear"): _Object,
    ("torch._C", "_VariableFunctions"): _Object,
    ("builtins", "getattr"): lambda thing, name: name,  # the activation, by name
    ("collections", "OrderedDict"): dict,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data.detach().numpy(),
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): lambda data: torch.load(
        io.BytesIO(data), weights_only=True
    ),
}
