"""Weights files → a model's parameters. Only formats that cannot run code: safetensors and torch's weights_only state dicts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.files import existing_file
from twofour.sources.models import nearest_model


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or of a torch state dict, by name.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    path = existing_file(path, "weights file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"weights file {str(path)!r} is not a readable safetensors file: {error}; write or fetch it again") from error
    state: Any
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # NOTE: on bytes that are no checkpoint torch.load raises whatever its parsers meet (UnpicklingError, struct.error, KeyError, …).
    except Exception as error:
        raise InputError(
            f"weights file {str(path)!r} is neither safetensors (named .safetensors) nor a torch state dict of plain tensors; "
            "save model.state_dict() alone, or fetch the file again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise InputError(
            f"weights file {str(path)!r} holds {type(state).__name__}, expected tensors by parameter name; save model.state_dict()"
        )
    tensors: dict[str, Tensor] = state
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors


def load_weights(model: nn.Module, path: str | Path, *, spec: str = "") -> None:
    """Fill `model` from the file at `path`, in place; every parameter and buffer must be there with its shape.

    Args:
        spec: the model's name on the command line, to offer a nearer one where the file does not fit.

    Raises:
        InputError: names or shapes do not fit; the model is left as it was.
    """
    path = Path(path)
    state, own = read_state(path), model.state_dict()
    # Checkpoints older than torch 0.4.1 do not count batches; nothing but a momentum of None reads the count.
    state |= {name: own[name] for name in own.keys() - state.keys() if name.endswith("num_batches_tracked")}
    missing, surplus = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or surplus:
        raise InputError(
            f"weights file {str(path)!r} does not fit the model: {_counted(missing, 'names missing')}, "
            f"{_counted(surplus, 'not in the model')}; {_cure(spec, state)}"
        )
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        name = wrong[0]
        heads = {name.rpartition(".")[0] for name in wrong}
        cure = (
            "the file's head has another number of classes than the data, give the data that it was trained on"
            if len(heads) == 1
            else _cure(spec, state)
        )
        raise InputError(
            f"weights file {str(path)!r}: {name!r} has shape {list(state[name].shape)}, the model expects {list(own[name].shape)}"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            + f"; {cure}"
        )
    model.load_state_dict(state)


def _counted(names: list[str], what: str) -> str:
    return f"{len(names)} {what} (first: {names[:3]})" if names else f"0 {what}"


def _cure(spec: str, state: dict[str, Tensor]) -> str:
    near = nearest_model(spec, state) if spec else ""
    return f"they fit {near!r}" if near else "give the weights of this architecture"
