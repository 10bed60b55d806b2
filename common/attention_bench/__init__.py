"""Attention measured against the machine: backends, points, sweeps, figures."""
