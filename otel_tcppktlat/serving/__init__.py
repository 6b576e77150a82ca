"""The broker: shows a process that asks over a Unix socket what was measured of itself, and nothing else."""
