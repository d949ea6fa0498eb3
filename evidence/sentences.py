"""MiniLM as an encoder of sentences, and the sentences: STS-B, SST-2, MRPC and SICK as their authors' files."""

import contextlib
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from twofour.errors import MissingExtraError
from twofour.sources.torchvision_compat import import_torchvision

# A torchvision made for another torch, if one is installed, would keep transformers from importing.
with contextlib.suppress(MissingExtraError):
    import_torchvision()
from transformers import AutoTokenizer, BertConfig, BertModel

PRUNED = {"include": ["bert.encoder.layer.*"], "exclude": ["bert.embeddings.*"]}
LONGEST = 128


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
        """Return what `forward` does, and the hidden states: of the embeddings and after every layer."""
        output = self.bert(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        mask = attention_mask[..., None].to(output.last_hidden_state.dtype)
        return self.classifier((output.last_hidden_state * mask).sum(1) / mask.sum(1)), output.hidden_states


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
    """Sentences as lists of token numbers; `batch` pads those asked for."""

    def __init__(self, folder: Path, sentences: Sequence[str], device: torch.device) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "minilm")
        self.ids: list[list[int]] = tokenizer(list(sentences), truncation=True, max_length=LONGEST)["input_ids"]
        self.device = device

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, which: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return token numbers and attention mask, `[n, longest]`."""
        chosen = [self.ids[i] for i in which]
        longest = max(map(len, chosen))
        ids = torch.tensor([line + [0] * (longest - len(line)) for line in chosen])
        mask = torch.tensor([[1] * len(line) + [0] * (longest - len(line)) for line in chosen])
        return ids.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def outputs(self, model: nn.Module, items: int = 256) -> Tensor:
        """Return the model's outputs for all, in order, computed in fp32 without dropout."""
        training = model.training
        model.eval()
        order = sorted(range(len(self)), key=lambda i: len(self.ids[i]))
        parts = [model(*self.batch(order[at : at + items])) for at in range(0, len(order), items)]
        model.train(training)
        return torch.cat(parts)[torch.tensor(order).argsort().to(self.device)]


def pairs(folder: Path, split: str) -> list[tuple[str, str, float]]:
    """Return the pairs of STS-B with their score from 0 to 5."""
    with (folder / "stsb" / f"stsb-en-{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(one, other, float(score)) for one, other, score in csv.reader(file)]


def labelled(folder: Path, split: str) -> list[tuple[str, int]]:
    """Return the sentences of SST-2 with their label; `test` is GLUE's dev split, `dev` was split off its training set."""
    lines = (folder / "glue-sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]


def unlabelled(folder: Path) -> list[str]:
    """Return the training sentences of STS-B, MRPC, SICK and the longer ones of SST-2, once each."""
    mrpc = (folder / "mrpc" / "msr-para-train.tsv").read_text(encoding="utf-8-sig").splitlines()[1:]
    sick = (folder / "sick" / "SICK_train.txt").read_text(encoding="utf-8").splitlines()[1:]
    found = [text for pair in pairs(folder, "train") for text in pair[:2]]
    found += [text for line in mrpc for text in line.split("\t")[3:5]]
    found += [text for line in sick for text in line.split("\t")[1:3]]
    found += [text for text, _ in labelled(folder, "train") if len(text) > 40]
    return list(dict.fromkeys(found))
