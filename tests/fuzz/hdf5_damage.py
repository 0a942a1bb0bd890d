"""Damage to the contents of an HDF5 file, whose structure and checksums stay sound."""

from __future__ import annotations

import io
import random

import h5py
import numpy as np

from tests.fuzz.damage import tree_changed

_DTYPES = ("<f4", "<f8", "<i8", "|u1", "|b1", "<f2", ">f4", "S3", "<i2", "<c8")


def contents_changed(data: bytes, rng: random.Random) -> bytes:
    """Members and attributes replaced, removed, linked elsewhere or made to claim more."""
    buffer = io.BytesIO(data)
    try:
        with h5py.File(buffer, "r+") as file:
            for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
                places: list[str] = []
                file.visit(places.append)
                _change(file, rng.choice(places) if places else "new", rng)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError):
        pass  # what has been changed by then is damage enough
    return buffer.getvalue()


def _change(file: h5py.File, name: str, rng: random.Random) -> None:
    kind = rng.randrange(13)
    node = file.get(name)
    if kind == 0 and node is not None:
        del file[name]
    elif kind == 1:
        _replace(file, name, _values(node, rng))
    elif kind == 2:
        _unlink(file, name)
        file.create_group(name)
    elif kind == 3:
        _unlink(file, name)
        file[name] = h5py.ExternalLink("../outside/canary.h5", "/data")
    elif kind == 4:
        _unlink(file, name)
        file[name] = h5py.SoftLink(rng.choice(("/", name, "/nothing", "/data")))
    elif kind == 5:
        _unlink(file, name)
        source = h5py.VirtualSource("../outside/canary.h5", "data", (4,), "<f4")
        layout = h5py.VirtualLayout((4,), "<f4")
        layout[:] = source
        file.create_virtual_dataset(name, layout)
    elif kind == 6:
        _unlink(file, name)
        file.create_dataset(name, (4,), "<f4", external=[("../outside/canary.h5", 0, 16)])
    elif kind == 7:  # claims much and stores nothing
        _unlink(file, name)
        shape = rng.choice(((10**6,), (10**5, 100), (10**9, 10**6), (5, 3), (0, 3), (2**20, 0)))
        chunk = tuple(min(max(n, 1), 1000) for n in shape)
        file.create_dataset(name, shape, "<f4", chunks=chunk, compression="gzip")
    elif kind == 8:  # the same data many times over
        for index in range(rng.choice((1, 20, 300))):
            file[f"{name}_{index}"] = file[name]
    elif kind == 9 and isinstance(node, h5py.Group):
        node[rng.choice(("loop", "000001", "demo_9", "traj_9", "episode_9"))] = file["/"]
    elif kind == 10 and isinstance(node, h5py.Dataset) and node.size:
        values = np.array(node[()])
        flat = values.reshape(-1)
        if flat.dtype.kind in "fiub":
            with np.errstate(all="ignore"):
                flat[rng.randrange(flat.size)] = rng.choice((np.nan, np.inf, 1e30, -1e30, 2, -1, 0))
            node[()] = values
    else:
        _attribute(node if node is not None and rng.random() < 0.7 else file, rng)


def _values(node: object, rng: random.Random) -> object:
    if not isinstance(node, h5py.Dataset) or rng.random() < 0.15:
        return rng.choice(
            (3, b"text", "text", np.nan, np.zeros((2, 2)), np.array([b"demo_7", b"x"]))
        )
    values = node[()]
    kind = rng.randrange(6)
    if kind == 0:
        return np.asarray(values).astype(rng.choice(_DTYPES))
    if kind == 1 and np.ndim(values):
        return values[: rng.randrange(len(values) + 1)]
    if kind == 2:
        return np.asarray(values)[None]
    if kind == 3:
        return np.asarray(values).reshape(-1)
    if kind == 4 and np.ndim(values):
        return np.concatenate([values, values])
    return np.zeros((*np.shape(values), 2), np.float32)


def _replace(file: h5py.File, name: str, value: object) -> None:
    _unlink(file, name)
    file[name] = value


def _unlink(file: h5py.File, name: str) -> None:
    if file.get(name, getlink=True) is not None:
        del file[name]


def _attribute(node: h5py.HLObject, rng: random.Random) -> None:
    keys = list(node.attrs)
    key = (
        rng.choice(keys) if keys and rng.random() < 0.8 else rng.choice(("success", "version", "x"))
    )
    if keys and rng.random() < 0.15:
        del node.attrs[key]
        return
    value = tree_changed(node.attrs[key] if key in keys else "", rng)
    if (
        isinstance(value, (dict, list))
        or value is None
        or isinstance(value, int)
        and abs(value) >= 2**63
    ):
        value = rng.choice(
            (h5py.Empty("f4"), np.array([1.0, 2.0]), "{", '{"a": 1}', '{"env_name": []}')
        )
    node.attrs[key] = value.encode("utf-8", "replace")[:60000] if isinstance(value, str) else value
