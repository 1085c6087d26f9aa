"""Checkpoints: whole or absent. What is damaged is named, skipped, and never loaded."""

import json
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from muonlm.cli.main import main
from muonlm.config.runs import checkpoints, locate, read_config
from muonlm.errors import UserError
from muonlm.training import checkpoint

FILES = ("model.safetensors", "state.safetensors", "meta.json")


def tensors(value: float) -> dict:
    return {"w": torch.full((40, 40), value)}


def save(run, step, *, best=False, keep=2):
    return checkpoint.save(
        run, step, tensors(step), {"w/exp_avg": torch.ones(40, 40)}, {"data": "d"}, best=best, keep=keep
    )


@pytest.fixture
def run(tmp_path):
    """Steps 10 and 20; 20 is best and latest."""
    save(tmp_path, 10)
    save(tmp_path, 20, best=True)
    return tmp_path


def names(run) -> list[str]:
    return [path.name for path in checkpoints(run)]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


DAMAGE = {
    "truncated": truncate,
    "with one bit flipped": flip,
    "empty": empty,
    "missing": lambda path: path.unlink(),
    "another JSON": lambda path: path.write_text("[1, 2]"),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe{}"),
}


def test_what_was_saved_is_read_back_bit_for_bit(run):
    model, state, meta = checkpoint.read(run / "checkpoints" / "step-00000020")
    assert (
        torch.equal(model["w"], tensors(20)["w"])
        and torch.equal(state["w/exp_avg"], torch.ones(40, 40))
        and meta["step"] == 20
    )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_older_checkpoint_is_taken(run, file, damage):
    DAMAGE[damage](run / "checkpoints" / "step-00000020" / file)
    said = []
    model, _, meta = checkpoint.latest_valid(run, warn=said.append)
    assert meta["step"] == 10 and torch.equal(model["w"], tensors(10)["w"])
    assert len(said) == 1 and "step-00000020" in said[0] and file in said[0]
    with pytest.raises(UserError, match=file):
        checkpoint.read(run / "checkpoints" / "step-00000020")


def test_every_bit_of_the_metadata_counts(run):
    """A flip may leave valid JSON: only the checksum sees it. Each byte of the file is tried."""
    path = run / "checkpoints" / "step-00000020" / "meta.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            meta = checkpoint.read_meta(path.parent)
        except UserError:
            continue
        assert whole[at : at + 1].isspace() and meta["step"] == 20, at  # white space between values carries nothing


def test_a_half_written_directory_is_skipped(run):
    later = run / "checkpoints" / "step-00000030"
    later.mkdir()
    (later / "model.safetensors").write_bytes(b"\0" * 100)
    said = []
    assert checkpoint.latest_valid(run, warn=said.append)[2]["step"] == 20 and "step-00000030" in said[0]


def test_what_a_kill_leaves_while_writing_is_no_checkpoint_and_goes_with_the_next(run):
    left = run / "checkpoints" / ".step-00000030-77"
    left.mkdir()
    assert names(run) == ["step-00000010", "step-00000020"] and checkpoint.latest_valid(run)[2]["step"] == 20
    save(run, 40)
    assert not left.exists()


def test_all_damaged_means_none_and_resume_says_so(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    for path in checkpoints(tmp_path / "run"):
        flip(path / "model.safetensors")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "no checkpoint that can be read" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_resume_falls_back_to_the_older_checkpoint_and_repeats_the_steps_since(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step-00000006" in said and "Skipped" in said and "resumed at step 3" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "loss" in r) for r in lines] == [
        (0, False),
        (1, True),
        (2, True),
        (3, True),
        (3, False),
        (4, True),
        (5, True),
        (6, True),
        (6, False),
    ]
    mine, theirs = (checkpoint.read(r / "checkpoints" / "step-00000006") for r in (tmp_path / "run", finished))
    assert all(torch.equal(mine[0][name], theirs[0][name]) for name in theirs[0])


@pytest.mark.parametrize("verb", [["generate"], ["eval"]])
def test_no_verb_reads_a_damaged_checkpoint(finished, tmp_path, capsys, verb):
    shutil.copytree(finished, tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "step-00000006" / "model.safetensors")
    assert main([*verb, str(tmp_path / "run")]) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_keep_drops_the_oldest_but_never_the_best(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # a run, as far as `locate` is concerned
    for step in range(1, 7):
        save(tmp_path, step, best=step == 2, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    assert locate(tmp_path, "best")[1].name == "step-00000002"
    assert locate(tmp_path, "latest")[1].name == "step-00000006"
    assert locate(tmp_path, "step-00000005")[1].name == "step-00000005"
    with pytest.raises(UserError, match="step-00000005"):  # names what there is
        locate(tmp_path, "step-00000004")


def test_a_full_disk_gives_one_message_and_keeps_what_was(tmp_path):
    """A real limit of the system on the size of files, so that writing fails half-way through."""
    save(tmp_path, 10)
    code = (
        "import torch, sys\nfrom muonlm.training import checkpoint\nfrom muonlm.errors import UserError\n"
        "try:\n    checkpoint.save(sys.argv[1], 20, {'w': torch.zeros(1000, 1000)}, {}, {}, best=True, keep=1)\n"
        "except UserError as error:\n    print(error)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, preexec_fn=limit, timeout=60
    )
    assert (
        "could not be written" in result.stdout
        and "MiB free" in result.stdout
        and "--resume" in result.stdout
        and not result.stderr
    )
    assert names(tmp_path) == ["step-00000010"] and checkpoint.latest_valid(tmp_path)[2]["step"] == 10
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_failure_while_the_directory_is_put_in_place_keeps_the_old_ones(tmp_path, monkeypatch):
    save(tmp_path, 10)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("muonlm.storage.os.replace", refuse)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, 20)
    assert names(tmp_path) == ["step-00000010"]


def test_foreign_weights_are_refused_by_name_and_change_nothing():
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(UserError, match=r"bias is \(4,\) in the file, \(2,\) in the model"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(4)}, "x")
    with pytest.raises(UserError, match="lacks 'bias'"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 3)}, "x")
    with pytest.raises(UserError, match="unexpected 'extra'"):
        checkpoint.load_weights(
            model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "x"
        )
    assert torch.equal(model.weight, before)


def test_nothing_is_unpickled(run):
    """A pickle in the place of the weights is refused before it is opened, even where meta.json vouches for it."""
    folder = run / "checkpoints" / "step-00000020"
    torch.save({"w": torch.zeros(2)}, folder / "model.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("checksum")
    meta["files"]["model.safetensors"] = checkpoint._digest(folder / "model.safetensors")
    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": checkpoint._checksum(meta)}))
    with pytest.raises(Exception) as caught:  # noqa: PT011
        checkpoint.read(folder)
    assert "safetensors" in type(caught.value).__module__ or isinstance(caught.value, UserError)


def test_files_can_be_read_by_others_as_the_umask_says(run):
    import os
    import stat

    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((run / "checkpoints" / "step-00000020").stat().st_mode) == 0o777 & ~mask


def test_a_run_from_before_muon_had_a_section_of_its_own_is_read_and_resumed(finished, tmp_path, capsys):
    run = tmp_path / "old"
    shutil.copytree(finished, run)
    tree = json.loads((run / "config.json").read_text())
    tree["optim"] |= tree.pop("muon") | {"momentum": 0.9}
    (run / "config.json").write_text(json.dumps(tree))
    cfg = read_config(run)
    assert cfg.muon.momentum == 0.9 and cfg.optim == read_config(finished).optim
    assert main(["train", "--resume", str(run), "--train.steps", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 8
    assert json.loads((run / "config.json").read_text())["muon"]["momentum"] == 0.9
