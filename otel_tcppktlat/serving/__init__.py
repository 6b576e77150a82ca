"""The broker: shows a process that asks over a Unix socket what was measured of itself, and nothing else."""

MOST_CLIENTS = 512  # two descriptors and some 70 kB each
