"""The services of onebase.v1: each method is the order of its steps, and nothing else."""
