"""The GPU path taken to a machine without a network: `pack` here, `there` there (docs/gpu.md)."""
