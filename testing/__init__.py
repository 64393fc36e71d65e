"""Exact flows, and checks for those who add components of their own."""

from pathline.testing.checks import (
    check_backbone,
    check_guidance,
    check_interpolant,
    check_objective,
    check_solver,
)
from pathline.testing.mixtures import ExactPrediction, GaussianMixture

__all__ = [
    "ExactPrediction",
    "GaussianMixture",
    "check_backbone",
    "check_guidance",
    "check_interpolant",
    "check_objective",
    "check_solver",
]
