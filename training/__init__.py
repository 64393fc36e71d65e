"""Training on Lightning Fabric: the loop, its state, checkpoints and log."""

from pathline.training.loop import Interrupted, Trainer, check_machine, make_fabric

__all__ = ["Interrupted", "Trainer", "check_machine", "make_fabric"]
