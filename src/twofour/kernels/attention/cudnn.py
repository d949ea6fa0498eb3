"""cuDNN's scaled dot-product attention."""

from typing import Any

from twofour.errors import InputError
from twofour.kernels.attention.contract import Problem
from twofour.kernels.cudnn import Graph, Handle, output, tensor

WORKSPACE_BYTES = 128 << 20
_Q, _K, _V, _O = 1, 2, 3, 4


def why_not(problem: Problem) -> str | None:
    """Return why cuDNN cannot compute `problem`, or None when it may; it may still list no plan."""
    if problem.head % 8 or problem.head > 256:
        return f"cudnn's attention takes heads in multiples of 8 up to 256 features, not {problem.head}"
    for name in "qkvo":
        if any(s % 8 for s in problem.strides(name)[:3]):
            return f"cudnn's attention wants strides in multiples of 8 elements, {name} has {problem.strides(name)}"
    return None


class CudnnAttention:
    """An attention by one of cuDNN's plans. Launches of one handle follow one another."""

    def __init__(
        self, problem: Problem, algorithm: int = 0, *, handle: Handle | None = None, device: int = 0, graph: bytes | None = None
    ) -> None:
        """Build plan `algorithm`, or read it from `graph`.

        Raises:
            InputError: `why_not(problem)` has a reason. MissingExtraError: the frontend or cuDNN is missing.
            UnsupportedError: cuDNN has no such plan.
        """
        reason = why_not(problem)
        if reason is not None:
            raise InputError(f"cudnn cannot compute {problem}: {reason}")
        self.problem = problem
        self._graph = Graph(problem, problem.dtype, self._describe, handle or Handle(device), WORKSPACE_BYTES)
        if graph is None:
            self._graph.build(algorithm)
        else:
            self._graph.read(graph)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch a call needs."""
        return self._graph.workspace_bytes

    def serialized(self) -> bytes:
        """Return the built plan as bytes."""
        return self._graph.serialized()

    def _describe(self, graph: Any, module: Any) -> None:
        p = self.problem
        q, k, v = (tensor(graph, module, n, p.dtype, p.shape(name), p.strides(name)) for n, name in ((_Q, "q"), (_K, "k"), (_V, "v")))
        o = graph.sdpa(q=q, k=k, v=v, **inference(graph), attn_scale=p.scale, use_causal_mask=p.causal, name="attention")[0]
        output(o, module, _O, p.dtype, p.shape("o"), p.strides("o"))

    def __call__(self, q: int, k: int, v: int, d: int, *, workspace: int = 0, stream: int = 0) -> None:
        """Launch on device addresses.

        Raises:
            InputError: an address is missing.
        """
        if not (q and k and v and d) or (self.workspace_bytes and not workspace):
            raise InputError(
                f"addresses q={q:#x}, k={k:#x}, v={v:#x}, d={d:#x}, workspace={workspace:#x}: expected device memory for everything"
            )
        self._graph.launch({_Q: q, _K: k, _V: v, _O: d}, workspace, stream)


def inference(graph: Any) -> dict[str, bool]:
    """Return how this frontend is told that no statistics are wanted: the name of that argument changed between versions."""
    documented = graph.sdpa.__doc__ or ""
    return {"is_inference": True} if "is_inference" in documented else {"generate_stats": False}


def num_plans(problem: Problem, handle: Handle) -> int:
    """Return how many plans cuDNN lists for `problem`.

    Raises:
        UnsupportedError: none.
    """
    made = object.__new__(CudnnAttention)
    made.problem = problem
    return Graph(problem, problem.dtype, made._describe, handle, WORKSPACE_BYTES).num_plans()
