"""Latency and throughput: `pytest --benchmark` (see docs/benchmarks.md)."""
