"""The policies that MyoSuite packages, and those in their files."""

import os
import pickle

import numpy as np
import pytest

from iqmpc import make_env
from iqmpc.demonstrators import npg
from iqmpc.demonstrators.npg import GaussianPolicy
from iqmpc.demos import DemonstrationError
from tests.fuzz.samples import npg as npg_samples


def test_the_packaged_policies_solve_their_tasks(solves):
    pytest.importorskip("myosuite")
    for task, env_id, seed in (
        ("myo-key-turn", "myoHandKeyTurnFixed-v0", 1),
        ("myo-obj-hold", "myoHandObjHoldFixed-v0", 3),
    ):
        policy, provenance = npg.packaged(env_id, generator=np.random.default_rng(0))
        assert f"{env_id}, seed {seed}" in provenance["demonstrator"]
        assert solves(make_env(task), policy, 0)


def test_a_gaussian_policy_against_its_formula():
    random = np.random.default_rng(0)
    layers = [
        (random.normal(size=(4, 3)), random.normal(size=4)),
        (random.normal(size=(2, 4)) * 0.1, np.zeros(2)),
    ]
    shift, scale = np.full(3, 0.5), np.full(3, 2.0)
    policy = GaussianPolicy(
        layers, shift, scale, np.full(2, 0.1), np.full(2, 0.5), np.log([0.2, 30.0]), noise=0.0
    )
    obs = random.normal(size=3)
    hidden = np.tanh(layers[0][0] @ ((obs - 0.5) / 2) + layers[0][1])
    mean = layers[1][0] @ hidden * 0.5 + 0.1
    np.testing.assert_allclose(policy(obs), mean, rtol=1e-6)
    policy.noise = 1.0
    drawn = np.array([policy(obs) for _ in range(2000)])
    assert drawn.dtype == np.float32 and np.abs(drawn).max() == 1  # clipped: σ_1 = 30
    assert drawn[:, 0].std() == pytest.approx(0.2, rel=0.1)


def test_a_policy_file_runs_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for content, found in (
        (pickle.dumps(Hostile()), r"it names \w+.mkdir, which is not admitted"),
        (b"\x80\x04.", "not an mjrl policy"),
        (b"", "not an mjrl policy"),
        (pickle.dumps({"model": 3}), "not an mjrl policy"),
    ):
        path = tmp_path / "best_policy.pickle"
        path.write_bytes(content)
        with pytest.raises(DemonstrationError, match=found):
            npg.load(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\x80\x04}r\xff\xff\xff\x7f.", "a memo of 2147483647 entries"),  # 16 GiB of table
        (b"\x80\x04\x95" + b"\xff" * 8 + b".", "FRAME length|damaged"),
        (b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.", "a call of numpy.ndarray"),
        (b"\x80\x02cnumpy\ndtype\n(U\x02O8K\x00K\x01tR.", "an array of Python objects"),
    ],
)
def test_a_policy_file_takes_no_memory_that_it_does_not_fill(tmp_path, content, found):
    path = tmp_path / "best_policy.pickle"
    path.write_bytes(content)
    with pytest.raises(DemonstrationError, match=found):
        npg.load(path)


def test_a_policy_without_one_of_its_parts(tmp_path):
    (files,) = npg_samples(tmp_path)[:1]
    ((name, content),) = files.items()
    assert npg.load(saved(tmp_path / name, content)).std.tolist() == [1.0, 1.0]
    for part in (b"in_shift", b"out_scale", b"log_std_val", b"fc_layers"):
        with pytest.raises(DemonstrationError, match="not an mjrl policy: '"):
            npg.load(saved(tmp_path / name, content.replace(part, part[:-1] + b"x")))


def saved(path, content):
    path.write_bytes(content)
    return path


def test_no_policy_is_packaged_that_twirls_the_pen():
    with pytest.raises(DemonstrationError, match="packages no policy that solves myoHandPenTwirl"):
        npg.packaged("myoHandPenTwirlFixed-v0")
