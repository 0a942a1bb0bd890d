"""Pack all that a GPU machine without a network lacks into one folder: `python -m
benchmarks.offline.pack --out kit`. Carry it there and run, in it, `python there.py report` and
`python there.py test`.

The folder has the sources, wheels of what a machine with torch, Triton, NumPy and pytest lacks,
iqmpc's own wheel for the target's Python, and a Triton cache of the judged plans. It stays below 64
MiB. `--python` is an interpreter of the target's version, with Triton of the target's version: the
cache serves that version alone (`manifest.json` names it), and without a cache the kernels are
compiled there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 64
# What iqmpc needs beside torch, Triton, NumPy, h5py, safetensors, typer, rich, pyyaml and
# tensorboard, in versions that go together (Hydra 1.3.2 refuses OmegaConf 2.4): all pure Python.
WHEELS = (
    "hydra-core==1.3.2",
    "omegaconf==2.3.1",
    "antlr4-python3-runtime==4.9.3",
    "gymnasium",
    "farama-notifications",
)
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "outputs", "results", "*.egg-info", "*.so", "__pycache__"
)
ASKED = (
    "import sys, torch, triton; "
    "print(sys.version.split()[0], torch.__version__, triton.__version__)"
)


def pack(
    out: Path,
    python: str = sys.executable,
    *,
    arch: int = 90,
    wheels: bool = True,
    cache: bool = True,
) -> dict[str, Any]:
    """Fill `out`, a new folder, and return its manifest.

    Raises `ValueError` for a folder that is not empty or a kit above the limit, and
    `CalledProcessError` where a step fails.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    shutil.copytree(ROOT, out / "source", symlinks=True, ignore=LEFT_OUT)
    shutil.copy(Path(__file__).with_name("there.py"), out)
    asked = subprocess.run([python, "-c", ASKED], capture_output=True, text=True, check=True)
    manifest = dict(zip(("python", "torch", "triton"), asked.stdout.split(), strict=True))
    manifest |= {"arch": arch if cache else None}
    if wheels:
        pip = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(out / "wheels")]
        subprocess.run([*pip, *WHEELS], check=True)
        subprocess.run([*pip, str(ROOT)], check=True, env=os.environ | {"CUDAARCHS": str(arch)})
    if cache:
        subprocess.run(
            [python, "-m", "benchmarks.offline.warm", "--arch", str(arch)],
            check=True,
            cwd=ROOT,
            env=os.environ | {"TRITON_CACHE_DIR": str(out / "triton-cache")},
        )
        prune(out / "triton-cache")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file() and not f.is_symlink())
    manifest["mib"] = round(size / 2**20, 1)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    if size > LIMIT_MIB << 20:
        raise ValueError(f"{out} has {manifest['mib']} MiB, expected at most {LIMIT_MIB}")
    return manifest


def prune(cache: Path) -> None:
    """Empty what is for whoever reads how a kernel came about; Triton looks whether it is there."""
    for file in cache.rglob("*"):
        if file.suffix in (".ttir", ".ttgir", ".llir", ".source", ".ptx"):
            file.write_bytes(b"")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline.pack")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--python", default=sys.executable, help="of the target's version")
    parser.add_argument("--arch", type=int, default=90, help="compute capability: 90 for sm_90")
    parser.add_argument("--no-wheels", action="store_true")
    parser.add_argument("--no-cache", action="store_true")
    given = parser.parse_args()
    try:
        manifest = pack(
            given.out,
            given.python,
            arch=given.arch,
            wheels=not given.no_wheels,
            cache=not given.no_cache,
        )
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.out}: {json.dumps(manifest)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
