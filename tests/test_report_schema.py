"""report.json: written and read back the same, documented field by field, refused in one sentence when it is something else."""

import json
from pathlib import Path

import pytest
from report_sample import many_layers, sample

from twofour.errors import InputError
from twofour.report import record, schema
from twofour.report.record import Report

DOCUMENT = Path(__file__).parent.parent / "docs" / "report.md"


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert schema.updated(text) == text, "run: python -m twofour.report.schema docs/report.md"


def test_every_field_has_a_meaning() -> None:
    assert len(schema.models()) == 13
    bare = [f"{model.__name__}.{name}" for model in schema.models() for name, field in model.model_fields.items() if not field.description]
    assert not bare


def test_links_of_the_document_lead_to_its_sections() -> None:
    tables = schema.field_tables()
    for model in schema.models():
        assert f"### {model.__name__}\n" in tables
    assert "| `layers` | list of [LayerRow](#layerrow) |" in tables
    assert "| `flops` | integer or null |" in tables


def test_the_command_rewrites_only_what_is_between_the_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "d.md"
    document.write_text(f"before\n{schema.BEGIN}\nstale\n{schema.END}\nafter\n", encoding="utf-8")
    assert schema.main([str(document)]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "stale" not in text
    assert schema.field_tables() in text
    assert schema.main([]) == 0
    assert capsys.readouterr().out == schema.field_tables()


def test_a_document_without_markers_is_refused() -> None:
    with pytest.raises(InputError, match=r"the document has no .* line; add it where the field tables should stand"):
        schema.updated("nothing here")


@pytest.mark.parametrize("layers", [None, many_layers(200)], ids=["small", "200 layers"])
def test_a_report_reads_back_as_it_was_written(tmp_path: Path, layers: list[record.LayerRow] | None) -> None:
    report = sample(layers)
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json(), encoding="utf-8")
    assert Report.load(path) == report


def written(tmp_path: Path, change: dict[str, object]) -> Path:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**json.loads(sample().model_dump_json()), **change}), encoding="utf-8")
    return path


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has schema 99, this version reads 1; run compress again"):
        Report.load(written(tmp_path, {"schema_version": 99}))


def test_a_wrong_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is damaged: metric_direction: input should be 'higher' or 'lower'"):
        Report.load(written(tmp_path, {"metric_direction": "sideways"}))
    with pytest.raises(InputError, match=r"is damaged: surprise: extra inputs are not permitted"):
        Report.load(written(tmp_path, {"surprise": 1}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report '.*absent\.json' does not exist"):
        Report.load(tmp_path / "absent.json")


def test_a_report_without_the_fields_added_since_still_loads(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    value = json.loads(path.read_text(encoding="utf-8"))
    del value["metric_unit"]
    path.write_text(json.dumps(value), encoding="utf-8")
    assert Report.load(path).metric_unit == ""
