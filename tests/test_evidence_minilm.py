"""The MiniLM experiment on a CPU, with a BERT of two narrow layers in the place of MiniLM."""

import csv
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
WORDS = ["a", "man", "plays", "dog", "runs", "good", "bad", "film", "very", "the"]


@pytest.fixture(scope="module")
def experiment() -> ModuleType:
    sys.path.insert(0, str(ROOT / "evidence"))
    import accuracy_minilm

    return accuracy_minilm


@pytest.fixture(scope="module")
def folder(experiment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders as the experiment reads them, a few lines each."""
    where = tmp_path_factory.mktemp("data")
    for name in ("minilm", "stsb", "glue-sst2", "mrpc", "sick"):
        (where / name).mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (where / "minilm" / "vocab.txt").write_text("\n".join(vocabulary))
    config = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": len(vocabulary)}
    (where / "minilm" / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 128, **config}))
    (where / "minilm" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    from sentences import BertConfig, BertModel

    torch.manual_seed(0)
    state = BertModel(BertConfig.from_pretrained(where / "minilm"), add_pooling_layer=False).state_dict()
    save_file({name: value.half().contiguous() for name, value in state.items()}, where / "minilm" / "model.fp16.safetensors")
    sentences = [f"{a} {b} {c}" for a in ("a", "the") for b in WORDS[1:5] for c in WORDS[5:8]]
    for split in ("train", "dev", "test"):
        with (where / "stsb" / f"stsb-en-{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(
                [one, other, i % 6] for i, (one, other) in enumerate(zip(sentences, reversed(sentences), strict=True))
            )
        lines = [f"{text}\t{i % 2}" for i, text in enumerate(sentences)]
        (where / "glue-sst2" / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    (where / "mrpc" / "msr-para-train.tsv").write_text("Quality\t1\t2\tone\tother\n1\t1\t2\tdog runs\tthe dog runs", encoding="utf-8-sig")
    (where / "sick" / "SICK_train.txt").write_text(
        "pair_ID\tA\tB\tscore\tjudgment\n1\tbad film\tgood film\t3\tNEUTRAL\n2\tA man, BAD.\tvery good\t3\tNEUTRAL"
    )
    return where


def test_sentences_are_read_and_batched_in_order(experiment: ModuleType, folder: Path) -> None:
    import sentences

    assert sentences.labelled(folder, "dev")[1] == ("a man bad", 1)
    assert sentences.pairs(folder, "dev")[1] == ("a man bad", "the runs bad", 1.0)
    # The sentences of STS-B's training split are those of its dev and test split here, so none of them is left.
    assert sentences.unlabelled(folder) == ["dog runs", "the dog runs", "bad film", "good film", "very good"]
    tokens = sentences.Tokens(folder, ["a very very good dog", "bad", "the dog runs"], torch.device("cpu"))
    ids, mask = tokens.batch(torch.tensor([2, 1]), tokens.length([2, 1]))
    assert ids.shape == mask.shape == (2, sentences.LENGTHS[0])
    assert mask.sum(1).tolist() == [5, 3]
    assert (ids[1, 3:] == 0).all()
    model = sentences.published_encoder(folder)
    outputs = tokens.outputs(model)
    # Padding changes nothing but the order of sums.
    for i in range(3):
        torch.testing.assert_close(outputs[i], model.eval()(*tokens.batch(torch.tensor([i]), tokens.sizes[i]))[0], rtol=1e-5, atol=1e-6)


def test_the_encoder_is_bert(experiment: ModuleType, folder: Path) -> None:
    import sentences

    tokens = sentences.Tokens(folder, ["a very very good dog", "bad", "the dog runs"], torch.device("cpu"))
    model = sentences.published_encoder(folder).eval()
    ids, mask = tokens.batch(torch.arange(3), 16)
    expected = model.bert(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    for mine, theirs in zip(model.with_states(ids, mask)[1], expected, strict=True):
        counted = mask.bool()
        torch.testing.assert_close(mine[counted], theirs[counted], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["stsb", "sst2"])
def test_an_experiment_runs_at_toy_size(
    experiment: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    out = tmp_path / "accuracy.json"
    words = f"accuracy_minilm.py {folder} {out} --task {task} --steps 2 --batch 4 --seeds 1 --method wanda --kept {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    experiment.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["variant"] for row in rows[::2]] == ["dense", "2:4 one-shot, magnitude", "2:4 one-shot, wanda", experiment.CONTROL, "2:4"]
    assert len({row["data"] for row in rows}) == 2
    assert all(-100 <= row["value"] <= 100 for row in rows)
    # Six matrices in each of two layers: four of 16×16, 16×32 and 32×16.
    assert [row.get("groups_24") for row in rows[::2]] == [None, 1024, 1024, None, 1024]
    # Nothing is left to train, so the dense network is not made again on a machine that has not got it.
    for name in ("train", "dense_network", "pruned"):
        monkeypatch.setattr(experiment, name, None)
    experiment.main()
    assert json.loads(out.read_text())["rows"] == rows


def test_no_training_begins_when_time_is_up(experiment: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"accuracy_minilm.py {folder} {tmp_path / 'accuracy.json'} --task sst2 --steps 1 --batch 4 --method wanda --kept {tmp_path}"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--minutes", "0"])
    monkeypatch.setattr(experiment, "Steps", None)
    with pytest.raises(SystemExit, match="dense: time was up before training began; run the same command again to go on"):
        experiment.main()
    with (
        experiment.FileLock(tmp_path / "minilm-sst2-24-sentences-1-steps.lock"),
        pytest.raises(SystemExit, match="dense: time is up while another process trains the dense network"),
    ):
        experiment.main()


def test_a_trial_is_not_taken_for_the_whole(experiment: ModuleType, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "accuracy.json"
    words = f"accuracy_minilm.py {folder} {out} --task sst2 --steps 1 --batch 4 --seeds 0 --method wanda --kept {tmp_path} --images 8"
    monkeypatch.setattr(sys, "argv", words.split())
    experiment.main()
    assert {row["data"] for row in json.loads(out.read_text())["rows"]} == {
        "SST-2 held-out training sentences, first 8, of a trial",
        "SST-2 test (GLUE's dev), first 8, of a trial",
    }


def test_without_labels_the_dense_network_has_nothing_to_learn(experiment: ModuleType, folder: Path) -> None:
    task = experiment.StsB(folder, torch.device("cpu"), None)
    dense = experiment.published_encoder(folder)
    recipe = experiment.Recipe(steps=1, lr=1e-3, batch=4, labels=0.0, distill=1.0)
    which = next(task.batches(recipe, 0))
    batch = torch.tensor(which), task.tokens["train"].length(which)
    assert float(task.loss(dense, dense, *batch, recipe).detach()) == pytest.approx(0, abs=1e-6)
    other = experiment.published_encoder(folder)
    # The second of two layers twice as large: ‖2h − h‖² / ‖h‖² = 1 for it, 0 for the first; the embedding keeps its direction.
    other.bert.encoder.layer[1].output.LayerNorm.weight.data *= 2
    assert float(task.loss(other, dense, *batch, recipe).detach()) == pytest.approx(0.5, abs=1e-5)
