"""Memory of `prune_blocks` on a Llama of the 1B shape, measured, and of the 7B shape, computed from the same terms.

    python evidence/blocks_memory.py results/cpu/blocks-memory.json [--device cuda] [--layers 16]

The weights are random: memory does not depend on their values. Blocks are alike and done one after another, so the peak is that of any
one of them; `--layers` says how many the model has. On a CPU the block's copy, its statistics and the activations share the machine's
memory with the model; the peak above the model is reported. On a GPU it is what the allocator handed out.
"""

import argparse
import contextlib
import datetime
import json
import time
from pathlib import Path
from typing import Any

import torch
from methods import Sampler, machine

import twofour
from twofour.errors import MissingExtraError
from twofour.pruning.decide import hessian_bytes
from twofour.sources.torchvision_compat import import_torchvision

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": 32},
}
VOCABULARY = 32000


def layers_of(shape: dict[str, int]) -> list[tuple[int, int]]:
    """Return `(out, in)` of the seven linear layers of a block."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    narrow = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]


def expected(shape: dict[str, int], batch_tokens: int) -> dict[str, int]:
    """Return the terms of the peak with SparseGPT, in bytes, and their sum: an upper bound, as they are not all there at once.

    The block in bf16; XᵀX of all seven layers; of the layer that needs most, three more matrices of the size of its XᵀX and five fp32
    copies of the weight; one batch of activations in the widest place, three fp32 copies.
    """
    layers = layers_of(shape)
    terms = {
        "block": sum(2 * out * columns for out, columns in layers),
        "statistics": sum(hessian_bytes(columns) for _, columns in layers),
        "choosing": max(3 * hessian_bytes(columns) + 5 * 4 * out * columns for out, columns in layers),
        "batch": 3 * 4 * batch_tokens * shape["intermediate_size"],
    }
    return terms | {"peak": terms["block"] + terms["statistics"] + max(terms["choosing"], terms["batch"])}


def measure(device: str, layers: int, sequences: int, tokens: int) -> dict[str, Any]:
    """Return the row of the 1B shape."""
    with contextlib.suppress(MissingExtraError):
        import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(**{**SHAPES["1B"], "num_hidden_layers": layers}, vocab_size=VOCABULARY, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    batches = [torch.randint(0, VOCABULARY, (1, tokens)) for _ in range(sequences)]
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with Sampler() as memory:
        start = time.perf_counter()
        record = twofour.prune_blocks(model, (batches[0][:, :8],), batches, method="sparsegpt", device=device)
        seconds = time.perf_counter() - start
    return {
        "shape": "1B",
        "layers": layers,
        "sequences": sequences,
        "tokens": tokens,
        "pruning": str(record),
        "seconds": round(seconds, 1),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "host_peak_bytes": memory.peak - memory.before,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "masks_bytes": sum(mask.numel() for mask in record.masks.values()),
        "values_bytes": 2 * sum(mask.numel() for mask in record.masks.values()),
        "activations_bytes": 2 * sequences * tokens * SHAPES["1B"]["hidden_size"],
        "expected": expected(SHAPES["1B"], tokens),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    row = measure(arguments.device, arguments.layers, arguments.sequences, arguments.tokens)
    seven = {"shape": "7B", "layers": 32, "sequences": 128, "tokens": 2048, "expected": expected(SHAPES["7B"], 2048)}
    weights = 32 * sum(out * columns for out, columns in layers_of(SHAPES["7B"]))
    seven |= {"model_bytes": 2 * (weights + 2 * VOCABULARY * 4096), "masks_bytes": weights, "values_bytes": 2 * weights}
    seven |= {"activations_bytes": 2 * 128 * 2048 * 4096}
    gpu = torch.cuda.get_device_name(arguments.device) if torch.device(arguments.device).type == "cuda" else None
    result = {
        "schema": 1,
        "kind": "blocks-memory",
        "machine": {**machine(), "gpu": gpu, "twofour": twofour.__version__},
        "date": datetime.date.today().isoformat(),
        "command": f"python evidence/blocks_memory.py {arguments.out} --device {arguments.device} --layers {arguments.layers}",
        "rows": [row, seven],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
