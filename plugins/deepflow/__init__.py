"""DeepFlow: deeply supervised flow transformers (arXiv:2503.14494). Importing it registers its components."""

from pathline.plugins.deepflow.backbone import DeepFlow
from pathline.plugins.deepflow.branches import Branches, Spoken
from pathline.plugins.deepflow.flows import AcceleratedPrediction, BranchFlow
from pathline.plugins.deepflow.guidance import BranchExit, InternalGuidance, LookAhead
from pathline.plugins.deepflow.measures import AccelerationError, BranchCosine, BranchLosses, ExtrapolationError
from pathline.plugins.deepflow.objective import DeepFlowObjective
from pathline.plugins.deepflow.refiner import VelocityRefiner
from pathline.plugins.deepflow.solver import Taylor
from pathline.plugins.deepflow.weights import DeepFlowFamily

__all__ = [
    "AcceleratedPrediction",
    "AccelerationError",
    "BranchCosine",
    "BranchExit",
    "BranchFlow",
    "BranchLosses",
    "Branches",
    "DeepFlow",
    "DeepFlowFamily",
    "DeepFlowObjective",
    "ExtrapolationError",
    "InternalGuidance",
    "LookAhead",
    "Spoken",
    "Taylor",
    "VelocityRefiner",
]
