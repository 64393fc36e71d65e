"""A small network for points in a few dimensions: toys, tests and examples."""

from __future__ import annotations

from torch import Tensor, nn

from pathline.backbones.base import Backbone, registry
from pathline.backbones.layers import LabelEmbedding, ScalarEmbedding, embed_gap
from pathline.core.errors import InputError

__all__ = ["MLP"]


@registry.register("mlp")
class MLP(Backbone):
    """A multilayer perceptron on (N, dim) points, their time and, if asked, their class label.

    Args:
        dim: number of coordinates.
        hidden_size: width of the hidden layers and of the embeddings.
        depth: number of hidden layers, at least 1.
        num_classes: class labels 0 … num_classes − 1; num_classes is the null label; 0 if unconditional.
        takes_gap: whether it takes the condition ``gap``, a length of time to look ahead, as ``mean-flow`` needs.

    Raises:
        InputError: a size below 1.
    """

    def __init__(
        self,
        *,
        dim: int = 2,
        hidden_size: int = 128,
        depth: int = 3,
        num_classes: int = 0,
        takes_gap: bool = False,
    ) -> None:
        super().__init__()
        numbers = (dim, hidden_size, depth, num_classes)
        if not all(isinstance(n, int) for n in numbers) or min(numbers[:-1]) < 1 or num_classes < 0:
            raise InputError(
                f"got dim {dim}, hidden_size {hidden_size}, depth {depth}, num_classes {num_classes}; "
                "expected positive whole numbers (num_classes may be 0)"
            )
        self.num_classes, self.null_label, self.input_shape = num_classes, num_classes or None, (dim,)
        self.time = ScalarEmbedding(hidden_size)
        self.labels = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        self.first = nn.Linear(dim, hidden_size)
        self.hidden = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(depth - 1))
        self.last = nn.Linear(hidden_size, dim)
        self.gap = ScalarEmbedding(hidden_size) if takes_gap else None

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor | None = None, gap: Tensor | None = None) -> Tensor:
        """Predict one tensor of x's shape (N, dim); t of shape (N,) or (), label and gap (0 if None) of shape (N,)."""
        self.check_inputs(x, t, label)
        condition = self.time(t.expand(len(x)))
        if self.labels is not None and label is not None:
            condition = condition + self.labels(label)
        ahead = embed_gap(self.gap, gap, condition[:, 0])
        condition = condition if ahead is None else condition + ahead
        h = nn.functional.silu(self.first(x) + condition)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        predicted: Tensor = self.last(h)
        return predicted
