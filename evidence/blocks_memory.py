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


def choosing(out: int, columns: int) -> int:
    """Return what SparseGPT takes to choose one bf16 layer beside its XᵀX, in bytes: the larger of two stages.

    The factorisation: three matrices of the size of XᵀX and the weight in fp32. The output error: the weight and the new values twice in
    fp32, the new values in bf16, the mask twice, and in the precision of XᵀX the change, its product with XᵀX and the product of both,
    with the weight itself where that precision is not fp32.
    """
    weights, size = out * columns, hessian_bytes(columns)
    wide = size // columns**2
    copies = 3 * 4 + 2 + 2 * 1 + wide * (3 if wide == 4 else 4)
    return max(3 * size + 4 * weights, copies * weights)


def expected(shape: dict[str, int], batch_tokens: int) -> dict[str, int]:
    """Return the terms of the peak with SparseGPT, in bytes; tensors only, without the workspaces of libraries.

    The block in bf16; with it either XᵀX of all seven layers and one batch of activations in the widest place, three fp32 copies, or what
    choosing takes and XᵀX of that layer and those after it: each is let go when its layer is chosen.
    """
    layers = layers_of(shape)
    sizes = [hessian_bytes(columns) for _, columns in layers]
    left, most = max(((sum(sizes[k:]), choosing(*layer)) for k, layer in enumerate(layers)), key=sum)
    terms = {
        "block": sum(2 * out * columns for out, columns in layers),
        "statistics": sum(sizes),
        "batch": 3 * 4 * batch_tokens * shape["intermediate_size"],
        "statistics_left": left,
        "choosing": most,
    }
    return terms | {"peak": terms["block"] + max(terms["statistics"] + terms["batch"], left + most)}


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
