"""The result folder: readable at every moment, strict JSON, one-line errors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedimpr.errors import FedimprError
from sim.results import Row, RunFolder, peak_memory_mb, read_metrics, read_rows, replace_file

ROW = Row("student by DI", 0.5, 0.8, 12.5, images=100, mining_seconds=4.5, transfer={"label_fidelity": 0.9}, notes=["3 of 100 are blank"])


def strict(path: Path) -> Any:
    """Parse JSON as the standard has it: NaN and Infinity are errors."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "a" / "run", start=time.monotonic())


def test_a_new_folder_is_a_running_run_with_an_empty_table(folder: RunFolder) -> None:
    run = strict(folder.path / "run.json")
    assert run["status"] == "running"
    assert run["versions"].keys() == {"python", "torch", "flwr", "fedimpr"}
    assert run["versions"]["torch"] == torch.__version__
    assert run["machine"]["cores"] >= 1
    assert strict(folder.path / "summary.json") == []


def test_finish_keeps_the_start_and_adds_how_it_ended(folder: RunFolder) -> None:
    started = strict(folder.path / "run.json")["started"]
    folder.finish("failed", error="client 3: no", seed=7, excluded=["client 1: late"])
    run = strict(folder.path / "run.json")
    assert (run["status"], run["error"], run["seed"], run["excluded"]) == ("failed", "client 3: no", 7, ["client 1: late"])
    assert run["started"] == started
    assert 0 <= run["wall_seconds"] < 60
    assert 0 < run["peak_memory_mb"] <= peak_memory_mb() + 0.05  # rounded


def test_rows_hold_every_field_by_name(folder: RunFolder) -> None:
    folder.rows([ROW])
    assert strict(folder.path / "summary.json") == [
        {
            "method": "student by DI",
            "accuracy": 0.5,
            "ratio": 0.8,
            "seconds": 12.5,
            "images": 100,
            "mining_seconds": 4.5,
            "mining_passes": None,
            "teacher_passes": None,
            "steps": None,
            "batch": None,
            "peak_memory_mb": None,
            "clients": None,
            "excluded": None,
            "bytes_down": None,
            "bytes_up": None,
            "simulated_seconds": None,
            "transfer": {"label_fidelity": 0.9},
            "notes": ["3 of 100 are blank"],
            "weights": None,
        }
    ]


def test_rows_come_back_as_they_were_written(folder: RunFolder) -> None:
    folder.rows([ROW])
    assert read_rows(folder.path / "summary.json") == [ROW]


def test_a_metric_is_on_disk_at_once_with_its_time(folder: RunFolder) -> None:
    folder.start -= 100
    folder.metric("client", client=2, loss=torch.tensor(0.25), test_accuracy=0.5)
    (line,) = read_metrics(folder.path / "metrics.jsonl")
    assert 100 <= line.pop("time") < 110
    assert line == {"stage": "client", "client": 2, "loss": 0.25, "test_accuracy": 0.5}


def test_what_is_not_finite_is_null_with_a_note(folder: RunFolder) -> None:
    folder.metric("client", loss=float("nan"), norms=[1.0, torch.tensor(float("-inf"))])
    folder.rows([Row("x", float("nan"), None, 1.0, transfer={"entropy": float("inf")})])
    metric = strict(folder.path / "metrics.jsonl")
    assert (metric["loss"], metric["norms"], metric["note"]) == (None, [1.0, None], "loss is nan; norms[1] is -inf")
    (row,) = strict(folder.path / "summary.json")
    assert (row["accuracy"], row["transfer"], row["note"]) == (None, {"entropy": None}, "accuracy is nan; transfer.entropy is inf")


JSON_LIKE = st.recursive(
    st.floats() | st.text() | st.none() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@settings(max_examples=50)
@given(value=JSON_LIKE)
def test_any_value_makes_one_strict_line(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("run"), start=0.0)
    folder.metric("any", value=value)
    assert strict(folder.path / "metrics.jsonl")["stage"] == "any"
    assert len(read_metrics(folder.path / "metrics.jsonl")) == 1


def test_a_manifest_may_hold_tensors(folder: RunFolder) -> None:
    folder.write_manifest({"counts": torch.tensor([[1, 2], [3, 4]]), "recipe": "iid"})
    assert strict(folder.path / "manifest.json") == {"counts": [[1, 2], [3, 4]], "recipe": "iid"}
    assert "[3, 4]" in (folder.path / "manifest.json").read_text()


def test_weights_come_back_with_their_metadata_even_where_tensors_share_memory(folder: RunFolder) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    path = folder.weights("student by DI", {"a": tensor, "b": tensor.T}, {"round": 1, "model": '{"name": "lenet5"}'})
    assert path == folder.path / "student-by-DI.safetensors"
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == {"round": "1", "model": '{"name": "lenet5"}'}
        assert torch.equal(file.get_tensor("a"), tensor)
        assert torch.equal(file.get_tensor("b"), tensor.T)


def test_a_name_cannot_leave_the_folder(folder: RunFolder) -> None:
    assert folder.weights("../../x", {}, {}).parent == folder.path


@settings(max_examples=50)
@given(cut=st.integers(0, 200))
def test_metrics_survive_a_cut_at_any_byte(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    lines = [json.dumps({"step": n, "text": "ü"}, ensure_ascii=False).encode() for n in range(5)]
    whole = b"".join(line + b"\n" for line in lines)[:cut]
    path.write_bytes(whole)
    # A line counts when all of it is there, with or without its newline.
    ends = [sum(len(line) + 1 for line in lines[: n + 1]) - 1 for n in range(5)]
    assert [line["step"] for line in read_metrics(path)] == [n for n in range(5) if ends[n] <= len(whole)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(FedimprError, match="m, line 2 is not a JSON object"):
        read_metrics(tmp_path / "m")


def test_no_file_holds_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_folder_used_again_starts_anew(folder: RunFolder) -> None:
    folder.metric("old")
    folder.rows([ROW])
    (folder.path / "impressions.png").touch()
    RunFolder(folder.path, start=0.0)
    assert strict(folder.path / "summary.json") == []
    assert {path.name for path in folder.path.iterdir()} == {"run.json", "summary.json", "summary.csv"}


def test_a_resumed_run_goes_on_after_the_last_whole_line(folder: RunFolder) -> None:
    folder.metric("one")
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "cut of')
    RunFolder(folder.path, start=0.0, resumed=True).metric("two")
    assert [line["stage"] for line in read_metrics(folder.path / "metrics.jsonl")] == ["one", "two"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    replace_file(path, b"old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FedimprError, match=r"cannot write .*summary\.json: No space left on device\. Free some space, or choose") as caught:
        replace_file(path, b"new")
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(folder: RunFolder) -> None:
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(FedimprError, match=r"cannot write .*metrics\.jsonl: No space left on device\. Free some space"):
        folder.metric("client", loss=1.0)


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(FedimprError, match="cannot write .*taken.*choose another folder"):
        RunFolder(tmp_path / "taken", start=0.0)
