"""Training on Lightning Fabric: the loop, its state, checkpoints and log."""

from pathline.training.loop import Interrupted, Trainer, make_fabric

__all__ = ["Interrupted", "Trainer", "make_fabric"]
