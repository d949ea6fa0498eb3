"""The folder that keeps finished blocks: what was begun, and for each block its masks and new values."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twofour.errors import InputError
from twofour.files import write_text, written_aside
from twofour.pruning.calibration import tensors_in
from twofour.pruning.methods.method import Choice

if TYPE_CHECKING:
    from twofour.pruning.block_inputs import Batch
    from twofour.pruning.blocks import Block

NAME = "twofour.blocks.json"
SCHEMA = 1
# Metadata of a block's file: the digest of its dense weights, and what is not a tensor of each choice.
KEY = "twofour.block"


def digest_of(tensors: list[Tensor]) -> str:
    """Return a SHA-256 of shapes, formats and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            sha.update(flat.view(torch.uint8).numpy().data)
    return sha.hexdigest()


def given_tensors(batches: "list[Batch]") -> list[Tensor]:
    """Return, batch by batch, each tensor that the blocks are called with once: activations, then masks and the like."""
    return [t for batch in batches for t in {id(t): t for t in (batch.hidden, *tensors_in(batch.others))}.values()]


class Journal:
    """Finished blocks on disk. One process at a time may use a folder.

    Raises:
        InputError: the folder was begun with other options or calibration data, or cannot be used.
    """

    def __init__(self, folder: str | Path, options: dict[str, Any], batches: "list[Batch]") -> None:
        self.folder = Path(folder)
        begun = {"schema": SCHEMA, **options, "calibration": digest_of(given_tensors(batches))}
        path = self.folder / NAME
        if path.is_file():
            try:
                earlier = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{str(path)!r} is damaged ({error}); delete the folder and start again") from error
            for key, value in begun.items():
                if not isinstance(earlier, dict) or earlier.get(key) != value:
                    raise InputError(f"resume folder {str(folder)!r} was begun with another {key}; give the same call, or another folder")
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"resume folder {str(folder)!r} cannot be made: {error.strerror}") from error
        write_text(path, json.dumps(begun))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def write(self, index: int, block: "Block", choices: dict[str, Choice]) -> None:
        """Keep the choices of a finished block."""
        from safetensors.torch import save_file

        tensors = {f"mask:{name}": choice.mask.contiguous() for name, choice in choices.items()}
        tensors |= {f"weight:{name}": choice.weight.contiguous() for name, choice in choices.items() if choice.weight is not None}
        about = {name: {"notes": list(choice.notes), "output_error": choice.output_error} for name, choice in choices.items()}
        with written_aside(self._path(index)) as aside:
            save_file(tensors, aside, {KEY: json.dumps({"dense": self._dense(block), "choices": about})})

    def read(self, index: int, block: "Block") -> dict[str, Choice] | None:
        """Return the choices of a block, or None where it is not finished.

        Raises:
            InputError: the file is damaged, or of other weights.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()[KEY])
                names = set(file.keys())
                choices = {
                    name: Choice(
                        file.get_tensor(f"mask:{name}"),
                        file.get_tensor(f"weight:{name}") if f"weight:{name}" in names else None,
                        tuple(about["choices"][name]["notes"]),
                        about["choices"][name]["output_error"],
                    )
                    for name in block.weights
                }
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{str(path)!r} is damaged ({error}); delete it, and the call goes on from there") from error
        if about["dense"] != self._dense(block):
            raise InputError(f"resume folder {str(self.folder)!r} was begun with other weights; give the same model, or another folder")
        return choices

    @staticmethod
    def _dense(block: "Block") -> str:
        return digest_of([block.module.get_parameter(inner) for inner in block.weights.values()])
