"""Which tensors of a checkpoint are pruned when only names, shapes and formats are known, and for every other one the reason."""

import re
from collections.abc import Iterable, Sequence

from twofour.pattern import Pattern
from twofour.pruning.eligibility import matching
from twofour.pruning.record import LayerRecord
from twofour.pruning.shards import FLOAT_BYTES, Entry

WEIGHT = re.compile(r"(^|\.)(weight|(in|q|k|v)_proj_weight)$")
# Reason -> pattern of the name without its last part. The names are those of Hugging Face, timm, torchvision and Llama checkpoints.
LEFT_DENSE = (
    (
        "embedding: rows are looked up, not multiplied",
        re.compile(r"(^|[._])(embed|embeds|embeddings?|embed_\w+|wte|wpe|tok_embeddings)($|\.)"),
    ),
    ("embedding: rows are looked up, not multiplied", re.compile(r"(^|\.)(\w+_embeddings?|relative_attention_bias|shared)$")),
    ("normalisation", re.compile(r"(^|\.)(\w*norm\w*|ln(_\w+)?|bn\d*|batch_?norm\w*)$", re.IGNORECASE)),
    (
        "classifier: the last linear before the output",
        re.compile(r"(^|\.)(lm_head|embed_out|classifier|score|head|heads\.head|qa_outputs|cls\.\w+(\.\w+)*)$|^(fc|output)$"),
    ),
    ("router: chooses the experts", re.compile(r"(^|\.)(router(\.\w+)?|gate|shared_expert_gate|wg)$")),
)


def why_not(entry: Entry, pattern: Pattern, transposed: str) -> str:
    """Return why the tensor cannot be pruned whatever the user wants, or an empty string."""
    if not WEIGHT.search(entry.name):
        return "not a weight by its name"
    if entry.dtype not in FLOAT_BYTES:
        return f"dtype {entry.dtype} is not a floating format"
    if 0 in entry.shape:
        return "no elements"
    return transposed or pattern.why_not(entry.shape)


def by_name(name: str) -> str:
    """Return why a tensor of this name is left dense by default, or an empty string."""
    stem = name.rpartition(".")[0]
    return next((f"{reason} (by its name; --include takes it in)" for reason, names in LEFT_DENSE if names.search(stem)), "")


def stored_transposed(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the reason for every matrix that is, or may be, stored `[in, out]`, as in GPT-2: its bias has the length of axis 1.

    Where one matrix of a set shows it, square ones with a bias cannot be told apart.
    """
    shapes = {entry.name: entry.shape for entry in entries}
    reasons, unclear = {}, []
    for name, shape in shapes.items():
        bias = shapes.get(name.removesuffix("weight") + "bias", ())
        if not name.endswith(".weight") or len(shape) != 2 or len(bias) != 1:
            continue
        if bias[0] == shape[1] != shape[0]:
            reasons[name] = "stored as [in, out]: its bias has the length of axis 1"
        elif shape[0] == shape[1]:
            unclear.append(name)
    return reasons | {name: "square, and others of the set are stored as [in, out]" for name in unclear if reasons}


def examine_names(entries: Sequence[Entry], pattern: Pattern, include: Sequence[str], exclude: Sequence[str]) -> dict[str, LayerRecord]:
    """Return one record for every tensor of two or more axes, by name.

    Raises:
        InputError: a glob of `include` or `exclude` matches nothing.
    """
    large = [entry for entry in entries if len(entry.shape) >= 2]
    names = [entry.name for entry in large]
    included, excluded = matching(include, names, "include"), matching(exclude, names, "exclude")
    transposed = stored_transposed(entries)
    records = {}
    for entry in large:
        reason = why_not(entry, pattern, transposed.get(entry.name, ""))
        if not reason and entry.name in excluded:
            reason = "excluded"
        if not reason and entry.name not in included:
            reason = by_name(entry.name)
        records[entry.name] = LayerRecord(entry.name, f"tensor {entry.dtype}", entry.shape, None, not reason, reason)
    return records
