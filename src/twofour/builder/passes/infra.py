"""What a pass is: `requires` says what the graph must be, `call` changes it in place, `ensures` says what it is afterwards."""

from abc import abstractmethod

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PostconditionError, PreconditionError

from twofour.builder.graph import ONNX_DOMAINS, remove_unused
from twofour.errors import TwofourError, VerificationError


class Rewrite(InPlacePass):
    """A pass over one graph: `rewrite` returns how many places it changed; what nobody reads any more is removed."""

    @property
    def name(self) -> str:
        """The class's name, by which errors speak of the pass."""
        return type(self).__name__

    def __call__(self, model_or_result: ir.Model | PassResult, /) -> PassResult:
        """Check `requires`, run, check `ensures`.

        Raises:
            TwofourError: as the two raise it.
        """
        try:
            return super().__call__(model_or_result)
        except (PreconditionError, PostconditionError) as error:
            if isinstance(error.__cause__, TwofourError):
                raise error.__cause__ from None
            raise

    @abstractmethod
    def rewrite(self, graph: ir.Graph) -> int:
        """Change the graph in place and return how many places were changed."""

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the model's graph and drop what became unused."""
        changed = self.rewrite(model.graph)
        removed = remove_unused(model.graph) if changed else 0
        return PassResult(model, modified=bool(changed or removed))


def forbid(model: ir.Model, where: str, *kinds: str) -> None:
    """Do nothing if no node is one of the given ONNX operators.

    Raises:
        VerificationError: one is; a pass before this one was left out or failed.
    """
    for node in model.graph:
        if node.domain in ONNX_DOMAINS and node.op_type in kinds:
            raise VerificationError(f"{where}: node {node.name!r} is still {node.op_type}, expected it to be rewritten before")


def require_static(model: ir.Model, where: str) -> None:
    """Do nothing if every value has a static shape.

    Raises:
        VerificationError: one has not.
    """
    for node in model.graph:
        for value in node.outputs:
            if (value.uses() or value.is_graph_output()) and (value.shape is None or not all(isinstance(s, int) for s in value.shape)):
                raise VerificationError(
                    f"{where}: value {value.name!r} of {node.op_type} {node.name!r} has no static shape; import it first"
                )
