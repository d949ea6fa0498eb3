"""MiniLM as an encoder of sentences, and the sentences: STS-B, SST-2, MRPC and SICK as their authors' files."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from twofour.errors import MissingExtraError
from twofour.sources.torchvision_compat import import_torchvision

# A torchvision made for another torch, if one is installed, would keep transformers from importing.
with contextlib.suppress(MissingExtraError):
    import_torchvision()
from transformers import AutoTokenizer, BertConfig, BertModel

PRUNED = {"include": ["bert.encoder.layer.*"], "exclude": ["bert.embeddings.*"]}
LENGTHS = (16, 24, 32, 48, 64, 96, 128)  # batches are padded to one of them: a captured step has fixed shapes
LONGEST = LENGTHS[-1]


class Encoder(nn.Module):
    """BERT, mean pooling and, with `num_classes`, a linear classifier.

    Returns the embedding `[n, width]` or the logits `[n, num_classes]`.
    """

    def __init__(self, config: Any, num_classes: int = 0) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, num_classes) if num_classes else nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.with_states(input_ids, attention_mask)[0]

    def with_states(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what `forward` does, and the hidden states: of the embeddings and after every layer.

        NOTE: not by `BertModel.forward`, whose making of masks looks at their values, which a captured step cannot wait for.
        """
        e = self.bert.embeddings
        x = e.word_embeddings(input_ids) + e.position_embeddings.weight[: input_ids.shape[1]] + e.token_type_embeddings.weight[0]
        x = e.dropout(e.LayerNorm(x))
        states = [x]
        for layer in self.bert.encoder.layer:
            x = self.after_layer(layer, x, attention_mask[:, None, None, :].bool())
            states.append(x)
        mask = attention_mask[..., None].to(x.dtype)
        return self.classifier((x * mask).sum(1) / mask.sum(1)), tuple(states)

    def after_layer(self, layer: nn.Module, x: Tensor, counted: Tensor) -> Tensor:
        """Return the hidden states after one layer; `counted` says which tokens are attended to."""
        attention, own = layer.attention, layer.attention.self
        heads = (*x.shape[:2], own.num_attention_heads, own.attention_head_size)
        q, k, v = (linear(x).view(heads).transpose(1, 2) for linear in (own.query, own.key, own.value))
        dropout = own.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, counted, dropout).transpose(1, 2).reshape(x.shape)
        x = attention.output.LayerNorm(attention.output.dropout(attention.output.dense(mixed)) + x)
        wide = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
        return layer.output.LayerNorm(layer.output.dropout(layer.output.dense(wide)) + x)  # type: ignore[no-any-return]


def published_encoder(folder: Path, *, num_classes: int = 0, dropout: float = 0.0) -> Encoder:
    """Return all-MiniLM-L6-v2 in fp32; a classifier starts at random from the torch seed."""
    config = BertConfig.from_pretrained(folder / "minilm", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = Encoder(config, num_classes)
    state = {name: value.float() for name, value in load_file(folder / "minilm" / "model.fp16.safetensors").items()}
    missing, _ = model.bert.load_state_dict(state, strict=False)
    if missing:
        raise SystemExit(f"model.fp16.safetensors lacks {missing}")
    return model


class Tokens:
    """Sentences as token numbers in one table on the device, padded; `batch` takes some of them as long as asked for."""

    def __init__(self, folder: Path, sentences: Sequence[str], device: torch.device) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "minilm")
        ids: list[list[int]] = tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"]
        self.sizes = list(map(len, ids))
        self.table = torch.tensor([line + [0] * (LONGEST - len(line)) for line in ids]).to(device)
        self.counts = torch.tensor(self.sizes).to(device)

    def __len__(self) -> int:
        return len(self.sizes)

    def length(self, which: Sequence[int]) -> int:
        """Return the first of `LENGTHS` that none of them is longer than."""
        longest = max(self.sizes[i] for i in which)
        return next(length for length in LENGTHS if length >= longest)

    def batch(self, which: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return token numbers and attention mask, `[n, length]`."""
        mask = torch.arange(length, device=which.device) < self.counts[which][:, None]
        return self.table[which, :length], mask.long()

    @torch.inference_mode()
    def outputs(self, model: nn.Module, items: int = 256) -> Tensor:
        """Return the model's outputs for all, in order, computed in fp32 without dropout."""
        training = model.training
        model.eval()
        order = sorted(range(len(self)), key=self.sizes.__getitem__)
        batches = [order[at : at + items] for at in range(0, len(order), items)]
        device = self.table.device
        parts = [model(*self.batch(torch.tensor(which, device=device), self.length(which))) for which in batches]
        model.train(training)
        return torch.cat(parts)[torch.tensor(order).argsort().to(device)]


def pairs(folder: Path, split: str) -> list[tuple[str, str, float]]:
    """Return the pairs of STS-B with their score from 0 to 5."""
    with (folder / "stsb" / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(one, other, float(score)) for one, other, score in csv.reader(file)]


def labelled(folder: Path, split: str) -> list[tuple[str, int]]:
    """Return the sentences of SST-2 with their label; `test` is GLUE's dev split, `dev` was split off its training set."""
    lines = (folder / "glue-sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]


def letters(text: str) -> str:
    """Return what is left of a sentence without case, spaces and punctuation."""
    return "".join(c for c in text.lower() if c.isalnum())


def unlabelled(folder: Path) -> list[str]:
    """Return the training sentences of STS-B, MRPC, SICK and the longer ones of SST-2, once each.

    Those that STS-B's dev or test split has too are left out: MRPC's training set holds hundreds of them.
    """
    mrpc = (folder / "mrpc" / "msr-para-train.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
    sick = (folder / "sick" / "SICK_train.txt").read_text(encoding="utf-8").splitlines()[1:]
    found = [text for pair in pairs(folder, "train") for text in pair[:2]]
    found += [text for line in mrpc for text in line.split("\t")[3:5]]
    found += [text for line in sick for text in line.split("\t")[1:3]]
    found += [text for text, _ in labelled(folder, "train") if len(text) > 40]
    judged = {letters(text) for split in ("dev", "test") for pair in pairs(folder, split) for text in pair[:2]}
    return [text for text in dict.fromkeys(found) if letters(text) not in judged]
