"""What the benchmarks share. Nothing here imports deft: the peers' processes, without it, use this too."""
