"""The images server on a Ray cluster, and what a cluster can be expected to make."""
