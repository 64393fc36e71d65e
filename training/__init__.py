"""Training on Lightning Fabric: the loop, its state, checkpoints and log."""

from pathline.training.devices import check_machine, make_fabric
from pathline.training.loop import Interrupted, Trainer

__all__ = ["Interrupted", "Trainer", "check_machine", "make_fabric"]
