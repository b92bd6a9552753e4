"""Several models in one go: what is found, what is skipped, and what goes on after an error."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import flip, load, matrix, same
from model_folders import write_shards
from safetensors.torch import save_file

from mxfp8.quant import conversion
from mxfp8.quant.conversion.batch import CONVERTED, FAILED, SKIPPED, convert_all, find_jobs
from mxfp8.quant.conversion.convert import convert_file
from mxfp8.quant.conversion.policy import Selection
from mxfp8.quant.format import read_header


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"a.weight": matrix(160, 64, seed=seed), "norm.weight": torch.ones(64)}


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with two models, one of them in a subfolder, and one in parts."""
    folder = tmp_path / "models"
    (folder / "more").mkdir(parents=True)
    save_file(model(1), folder / "one.safetensors")
    save_file(model(2), folder / "more" / "two.safetensors")
    write_shards(folder / "parts", model(3), 2)
    return folder


def targets(*sources, folder=None) -> dict[str, str]:
    """The names of sources and targets, by what is found."""
    return {job.source.as_posix(): job.target.as_posix() for job in find_jobs(sources, folder)}


def states(batch) -> dict[str, str]:
    return {Path(outcome.source).name: outcome.state for outcome in batch.outcomes}


def test_files_folders_and_patterns_lead_to_models(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    (models / "._one.safetensors").write_bytes(b"of macOS")
    everything = {
        "models/more/two.safetensors": "models/more/two-mxfp8.safetensors",
        "models/one.safetensors": "models/one-mxfp8.safetensors",
        "models/parts": "models/parts-mxfp8.safetensors",
    }
    one = {"models/one.safetensors": everything["models/one.safetensors"]}
    assert targets("models") == everything
    assert targets("models/*.safetensors") == one
    assert targets("models/one.safetensors", "models/*.safetensors") == one
    assert targets("models/**/t*.safetensors", "models/one.safetensors").keys() == {
        "models/more/two.safetensors",
        "models/one.safetensors",
    }
    assert targets("models/parts") == {"models/parts": "models/parts-mxfp8.safetensors"}
    monkeypatch.chdir("models/parts")
    assert [*targets(".").values()] == [(models / "parts-mxfp8.safetensors").as_posix()]


def test_targets_are_no_sources_however_their_folder_is_given(models, monkeypatch):
    monkeypatch.chdir(models)
    before = convert_all(find_jobs(["."], "new"))
    assert states(convert_all(find_jobs(["."], "new"))).keys() == states(before).keys()


def test_targets_are_in_a_folder_of_their_own_with_the_subfolders_of_their_sources(models):
    found = targets(models, folder="new")
    assert found[(models / "more/two.safetensors").as_posix()] == "new/more/two-mxfp8.safetensors"
    assert found[(models / "parts").as_posix()] == "new/parts-mxfp8.safetensors"
    found = targets(f"{models}/*/*.safetensors", folder="new")
    assert [*found.values()] == ["new/more/two-mxfp8.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="making links takes a right on Windows")
def test_a_link_to_a_folder_around_it_ends_the_search_there(models):
    (models / "more" / "again").symlink_to(models)
    assert len(targets(models)) == 3


def test_what_leads_to_nothing_is_an_error(models, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_jobs([tmp_path / "nowhere.safetensors"])
    for nothing in (f"{models}/x*.safetensors", models / "empty"):
        (models / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="no safetensors model"):
            find_jobs([nothing])


def test_two_models_with_one_target_are_an_error(models):
    save_file(model(4), models / "more" / "one.safetensors")
    with pytest.raises(ValueError, match="would both become"):
        find_jobs([models / "one.safetensors", models / "more" / "one.safetensors"], "new")


def test_each_is_converted_as_on_its_own(models, tmp_path):
    told, seen = [], []
    batch = convert_all(
        find_jobs([models], tmp_path / "new"),
        progress=lambda *call: seen.append(call),
        tell=told.append,
    )
    assert states(batch) == dict.fromkeys(
        ("two.safetensors", "one.safetensors", "parts"), CONVERTED
    )
    assert told == [*batch.outcomes]
    for outcome in batch.outcomes:
        convert_file(outcome.source, tmp_path / "alone.safetensors", overwrite=True)
        assert Path(outcome.target).read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
        assert outcome.bytes_before == 160 * 64 * 2 + 64 * 4
    done = [call[0] for call in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert "1 of 3, two.safetensors: a.weight" in [key for _, _, key in seen]


def test_what_is_finished_is_skipped_and_its_targets_are_no_sources(models):
    jobs = find_jobs([models])
    assert convert_all(jobs[:1]).outcomes[0].state == CONVERTED
    again = find_jobs([models])
    assert again == jobs
    batch = convert_all(again)
    assert [o.state for o in batch.outcomes].count(SKIPPED) == 1
    stamps = {job.target: job.target.stat().st_mtime_ns for job in jobs}
    assert {o.state for o in convert_all(again, overwrite=True).outcomes} == {SKIPPED}
    assert {job.target: job.target.stat().st_mtime_ns for job in jobs} == stamps


def changed(path: Path, change) -> None:
    tensors, metadata = load(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata)


def one_weight(tensors):
    tensors["a.weight"][5, 5] *= 8


def one_norm(tensors):
    tensors["norm.weight"][0] = 2


@pytest.mark.parametrize("change", [one_weight, one_norm])
def test_a_target_of_another_version_of_the_model_is_not_taken_for_finished(models, change):
    path = models / "one.safetensors"
    jobs = find_jobs([path])
    convert_all(jobs)
    changed(path, change)
    batch = convert_all(jobs)
    assert batch.outcomes[0].state == FAILED
    assert "exists and is not this conversion" in batch.outcomes[0].reason
    before = jobs[0].target.read_bytes()
    assert states(convert_all(jobs, overwrite=True)) == {"one.safetensors": CONVERTED}
    assert jobs[0].target.read_bytes() != before


def test_another_selection_is_another_conversion(models):
    tensors = {**model(), "b.weight": matrix(64, 64)}
    save_file(tensors, models / "one.safetensors")
    jobs = find_jobs([models / "one.safetensors"])
    convert_all(jobs)
    assert states(convert_all(jobs, Selection(exclude="^b"))) == {"one.safetensors": FAILED}
    assert states(convert_all(jobs)) == {"one.safetensors": SKIPPED}


def test_a_damaged_target_is_not_finished(models):
    jobs = find_jobs([models / "one.safetensors"])
    convert_all(jobs)
    flip(jobs[0].target, read_header(jobs[0].target).layers["a"].weight.begin)
    assert states(convert_all(jobs)) == {"one.safetensors": FAILED}
    jobs[0].target.write_bytes(b"not a model")
    assert states(convert_all(jobs)) == {"one.safetensors": FAILED}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_lack_of_memory_is_the_outcome_of_its_model(models, monkeypatch, error):
    def fail(source, *arguments, **options):
        raise error

    monkeypatch.setattr(conversion.batch, "convert", fail)
    batch = convert_all(find_jobs([models]))
    assert {outcome.state for outcome in batch.outcomes} == {FAILED}
    monkeypatch.setattr(conversion.batch, "convert", mistaken)
    with pytest.raises(RuntimeError, match="a mistake"):
        convert_all(find_jobs([models]))


def mistaken(*arguments, **options):
    raise RuntimeError("a mistake")


def test_errors_are_outcomes_and_the_next_model_follows(models):
    (models / "a damaged.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")
    nan = model()
    nan["a.weight"][3, 3] = float("nan")
    save_file(nan, models / "a nan.safetensors")
    lora = {"x.lora_up.weight": matrix(64, 4), "x.lora_down.weight": matrix(4, 64)}
    save_file(lora, models / "a lora.safetensors")
    save_file({"norm.weight": torch.ones(64)}, models / "a norm.safetensors")
    convert_file(models / "one.safetensors", models / "an mxfp8.safetensors")
    new = models.parent / "new" / "deep"
    batch = convert_all(find_jobs([models], new))
    assert states(batch) == {
        "a damaged.safetensors": FAILED,
        "a lora.safetensors": SKIPPED,
        "a nan.safetensors": FAILED,
        "a norm.safetensors": SKIPPED,
        "an mxfp8.safetensors": SKIPPED,
        "one.safetensors": CONVERTED,
        "parts": CONVERTED,
        "two.safetensors": CONVERTED,
    }
    reasons = {Path(o.source).name: o.reason for o in batch.outcomes}
    assert "LoRA" in reasons["a lora.safetensors"]
    assert "NaN" in reasons["a nan.safetensors"]
    assert "already quantized" in reasons["an mxfp8.safetensors"]
    assert batch.total().startswith("3 converted, 3 skipped, 2 failed; ")
    assert batch.summary().count("WARNING: the architecture is not recognized") == 3
    assert len(batch.summary().splitlines()) == 8 + 3 + 1
    data = json.loads(batch.to_json())
    assert [row["state"] for row in data["models"]] == [o.state for o in batch.outcomes]


def test_a_folder_that_may_not_be_read_stops_no_other(models, monkeypatch):
    """Such as lost+found; whoever runs tests as root may read it."""
    locked, iterdir = models / "more", Path.iterdir

    def refuse(path):
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    batch = convert_all(find_jobs([models]))
    assert states(batch) == {"more": FAILED, "one.safetensors": CONVERTED, "parts": CONVERTED}
    assert batch.of(FAILED)[0].reason == f"{locked}: Permission denied"


def test_a_model_whose_parts_are_not_those_of_its_index_failed(models):
    """Each of its files is sound, but the model is not there."""
    (index,) = (models / "parts").glob("*.json")
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["lost.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content), encoding="utf-8")
    (outcome,) = convert_all(find_jobs([models / "parts"])).outcomes
    assert outcome.state == FAILED
    assert "'lost.weight'" in outcome.reason


def test_a_failure_leaves_no_folder_behind(models):
    nan = model()
    nan["a.weight"][3, 3] = float("nan")
    save_file(nan, models / "nan.safetensors")
    jobs = find_jobs([models / "nan.safetensors"], models.parent / "new" / "deep")
    assert convert_all(jobs).outcomes[0].state == FAILED
    assert not (models.parent / "new").exists()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("below", [".", "new/deep"])
def test_a_file_where_the_folder_would_be_is_named(models, below, dry_run):
    file = models.parent / "file"
    file.write_bytes(b"")
    jobs = find_jobs([models / "one.safetensors"], file / below)
    (outcome,) = convert_all(jobs, overwrite=True, dry_run=dry_run).outcomes
    assert outcome.state == FAILED
    assert str(file) in outcome.reason
    assert outcome.reason.endswith(": not a folder; choose another")


def test_what_progress_raises_ends_the_batch_and_the_next_run_goes_on(models):
    jobs = find_jobs([models])

    def stop(done, total, key):
        if key.startswith("2 of 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_all(jobs, progress=stop)
    assert [job.target.exists() for job in jobs] == [True, False, False]
    assert [o.state for o in convert_all(jobs).outcomes] == [SKIPPED, CONVERTED, CONVERTED]
    tensors, _ = load(jobs[1].target)
    assert same(tensors["norm.weight"], model()["norm.weight"])
