"""checkpoints: whole or not there, whatever is killed, cut, flipped, missing or full."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import child
import pytest
import torch

from preftune import checkpoints
from preftune.checkpoints import latest, save
from preftune.errors import CheckpointError, DiskError, NumericsError


def groups(step: int, *, size: int = 64) -> dict[str, dict[str, torch.Tensor]]:
    """Two groups whose every number tells the step."""
    return {"weights": {"a": torch.full((size,), float(step)), "b": torch.tensor(step)},
            "optimizer": {"a.exp_avg": torch.full((size, 2), step, dtype=torch.bfloat16)}}  # fmt: skip


def write(run: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [save(run, step, groups(step), {"step": step, "epoch": step / 7}, keep=keep) for step in steps]


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_there_and_back_bit_for_bit(tmp_path):
    odd = {"half": torch.tensor([1.5, float("nan"), float("-inf")], dtype=torch.float16), "bf": torch.randn(3, 5).bfloat16(),
           "double": torch.tensor(0.1, dtype=torch.float64), "empty": torch.zeros(0, 4), "long": torch.arange(7),
           "bool": torch.tensor([True, False]), "rng": torch.get_rng_state(),
           "turned": torch.arange(6.0).reshape(2, 3).T}  # fmt: skip
    state = {"step": 100, "order": [3, 1, 2], "best": None, "name": "Grüße", "rate": 0.1}
    path = save(tmp_path, 100, {"odd": odd, "none": {}}, state, keep=2)
    assert path == tmp_path / "checkpoints" / "step-000100"
    assert sorted(os.listdir(path)) == ["manifest.json", "none.safetensors", "odd.safetensors", "state.json"]
    found = latest(tmp_path)
    assert (found.step, found.path, dict(found.state), found.skipped) == (100, path, state, ())
    back = found.tensors("odd")
    assert back.keys() == odd.keys() and found.tensors("none") == {}
    for key, value in odd.items():
        assert back[key].dtype == value.dtype and back[key].shape == value.shape
        assert torch.equal(checkpoints._bytes(back[key]), checkpoints._bytes(value)), key


def test_nothing_there_is_none_and_not_an_error(tmp_path):
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".tmp-step-000100-77").mkdir(parents=True)
    assert latest(tmp_path) is None


def test_the_newest_is_found_by_number_and_old_ones_go(tmp_path):
    write(tmp_path, 5, 90, 999_999, 1_000_000, keep=3)
    assert names(tmp_path) == ["step-000090", "step-1000000", "step-999999"]
    assert latest(tmp_path).step == 1_000_000
    write(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["step-1000001"]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    stale = tmp_path / "checkpoints" / ".tmp-step-000003-99"
    stale.mkdir(parents=True)
    (stale / "weights.safetensors").write_bytes(b"half")
    write(tmp_path, 4)
    assert names(tmp_path) == ["step-000004"]


# --- what can happen to a checkpoint afterwards ------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path) -> None:
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


FAULTS = (cut, flip, empty, Path.unlink, directory, link)
FILES = ("weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_newest_is_skipped_with_its_reason_and_the_one_before_is_used(tmp_path, file, fault):
    write(tmp_path, 100, 200)
    fault(tmp_path / "checkpoints" / "step-000200" / file)
    found = latest(tmp_path)
    assert found.step == 100 and found.state["step"] == 100
    assert torch.equal(found.tensors("weights")["a"], torch.full((64,), 100.0))
    assert len(found.skipped) == 1 and found.skipped[0].startswith("step-000200: ") and file in found.skipped[0]


def test_a_cut_file_is_told_by_its_size(tmp_path):
    write(tmp_path, 100, 200)
    cut(tmp_path / "checkpoints" / "step-000200" / "state.json")
    assert latest(tmp_path).skipped == ("step-000200: state.json: 41 bytes, the manifest says 42",)


def test_every_single_flipped_bit_of_a_manifest_or_state_is_noticed_or_harmless(tmp_path):
    """No flipped bit lets other tensors or another state through."""
    write(tmp_path, 100, 200)
    good = latest(tmp_path)
    for file in ("manifest.json", "state.json"):
        path = good.path / file
        whole = path.read_bytes()
        for at in range(0, len(whole), 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            found = latest(tmp_path)
            assert found.step == 100 or found.state == good.state
        path.write_bytes(whole)


def test_an_empty_folder_under_the_newest_name_is_skipped(tmp_path):
    write(tmp_path, 100)
    (tmp_path / "checkpoints" / "step-000200").mkdir()
    assert latest(tmp_path).skipped == ("step-000200: manifest.json: no such file",)


@pytest.mark.parametrize("manifest", [
    "[]", '{"step": 200}', '{"step": 200, "files": 7}', '{"step": 200, "files": {"state.json": 3}}',
    '{"step": 200, "files": {"a": {}}}', '{"step": 200, "files": {"state.json": {}, "../../../etc/passwd": {}}}',
    '{"step": "200", "files": {"state.json": {}}}',
])  # fmt: skip
def test_a_manifest_of_another_form_or_with_paths_in_it_is_refused(tmp_path, manifest):
    write(tmp_path, 100, 200)
    (tmp_path / "checkpoints" / "step-000200" / "manifest.json").write_text(manifest)
    assert latest(tmp_path).skipped == ("step-000200: manifest.json: not the manifest of a checkpoint",)


def test_a_renamed_checkpoint_is_not_believed(tmp_path):
    write(tmp_path, 100, 200)
    os.rename(tmp_path / "checkpoints" / "step-000100", tmp_path / "checkpoints" / "step-000300")
    found = latest(tmp_path)
    assert found.step == 200 and found.skipped == ("step-000300: manifest.json: says step 100",)


def test_a_link_in_place_of_a_checkpoint_is_not_followed(tmp_path):
    write(tmp_path, 100)
    (tmp_path / "checkpoints" / "step-000200").symlink_to(tmp_path / "checkpoints" / "step-000100")
    assert latest(tmp_path).step == 100 and latest(tmp_path).skipped == ()


def test_when_none_verifies_each_is_named(tmp_path):
    for path in write(tmp_path, 100, 200):
        flip(path / "weights.safetensors")
    each = r"no checkpoint can be used \(step-000200: weights.*; step-000100: weights.*\); start"
    with pytest.raises(CheckpointError, match=each) as caught:
        latest(tmp_path)
    assert caught.value.exit_code == 7


def test_damaged_older_ones_never_cost_the_good_one(tmp_path):
    """After a fallback the damaged newer one is written again; at no time is there none that verifies."""
    write(tmp_path, 100, 200, keep=2)
    flip(tmp_path / "checkpoints" / "step-000200" / "state.json")
    assert latest(tmp_path).step == 100
    write(tmp_path, 200, keep=2)
    assert latest(tmp_path).step == 200 and latest(tmp_path).skipped == ()
    assert names(tmp_path) == ["step-000100", "step-000200"]


def test_a_replaced_checkpoint_is_used_when_the_kill_falls_between_the_two_renames(tmp_path):
    write(tmp_path, 100)
    base = tmp_path / "checkpoints"
    os.rename(base / "step-000100", base / "step-000100-replaced")
    assert latest(tmp_path).step == 100
    save(tmp_path, 100, groups(100), {"step": 100, "again": True}, keep=1)
    assert names(tmp_path) == ["step-000100"] and latest(tmp_path).state["again"]
    shutil.copytree(base / "step-000100", base / "step-000100-replaced")  # killed after both renames, before the removal
    save(tmp_path, 100, groups(100), {"step": 100, "third": True}, keep=1)
    assert names(tmp_path) == ["step-000100"] and latest(tmp_path).state["third"]


# --- reading and writing -----------------------------------------------------------------------------------------------------


def rehash(folder: Path) -> None:
    """Make the manifest agree with what the files hold now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": checkpoints.sha256_file(folder / name)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 8, b"\x10\0\0\0\0\0\0\0{}", (2).to_bytes(8, "little") + b"[]",
                                     (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}     ',
                                     b"\x80\x04\x95pickle"])  # fmt: skip
def test_malformed_safetensors_is_told_without_a_traceback(tmp_path, content):
    (folder,) = write(tmp_path, 100)
    (folder / "weights.safetensors").write_bytes(content)
    rehash(folder)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: not a readable safetensors file"):
        latest(tmp_path).tensors("weights")


def test_a_group_that_is_not_there_is_named_with_the_nearest(tmp_path):
    write(tmp_path, 100)
    named = r"no tensors called 'wieghts' \(did you mean 'weights'\?\); it holds optimizer, weights"
    with pytest.raises(CheckpointError, match=named):
        latest(tmp_path).tensors("wieghts")


def test_a_state_that_is_not_finite_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(NumericsError):
        save(tmp_path, 1, groups(1), {"loss": float("nan")}, keep=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("wrong", [
    lambda real, tensors, path: (real(tensors, path), flip(path)),
    lambda real, tensors, path: real({key: value for key, value in tensors.items() if value.ndim}, path),
    lambda real, tensors, path: real({key: value.view(torch.int16) if value.dtype == torch.bfloat16 else value
                                      for key, value in tensors.items()}, path),
], ids=["bit", "lost", "dtype"])  # fmt: skip
def test_what_is_read_back_differently_is_not_published(tmp_path, monkeypatch, wrong):
    write(tmp_path, 100)
    real = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", lambda tensors, path: wrong(real, tensors, path))
    with pytest.raises(CheckpointError):
        write(tmp_path, 200, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000100"] and latest(tmp_path).step == 100


def test_the_order_of_fsync_and_rename(tmp_path, monkeypatch):
    """SIGKILL cannot show a missing fsync: all files, then the staging folder, then its name, then the parent."""
    calls = []
    real_fsync, real_rename = os.fsync, os.rename
    where = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(Path(os.readlink(where(fd))).name), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(f"rename {Path(a).name}"), real_rename(a, b)))
    write(tmp_path, 100)
    staging = f".tmp-step-000100-{os.getpid()}"
    inside = ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert calls == [*inside, staging, f"rename {staging}", "checkpoints"]


def save_beyond(run: str, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    big = {"weights": {"a": torch.ones(20_000 if limit == 40_000 else 1)}}
    with pytest.raises(DiskError, match=r"step-000200: cannot be written: larger than a file may be here .*intact"):
        save(run, 200, big, {"x": "y" * 30}, keep=1)


@pytest.mark.parametrize("limit", [100, 200, 40_000])  # the state, the manifest or the tensors do not fit
def test_a_full_disk_keeps_the_old_checkpoint_and_removes_the_staging_folder(tmp_path, limit, children):
    write(tmp_path, 100)
    assert children.call(save_beyond, tmp_path, limit) == 0, children.said()
    assert names(tmp_path) == ["step-000100"] and latest(tmp_path).step == 100
    write(tmp_path, 200)  # and with room again it goes on
    assert latest(tmp_path).step == 200


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, 100)
    monkeypatch.setattr(checkpoints, "free_bytes", lambda path: 100)
    with pytest.raises(DiskError, match=r"step-000200: no room for a checkpoint: .* needed, 100 bytes free, .* missing; what"):
        write(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step-000100"]


def save_for_ever(run: str, said: str, step: int) -> None:
    """Save for ever; a step is acknowledged, 8 bytes each, only after `save` has returned."""
    acknowledge = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        step += 1
        save(run, step, groups(step, size=100_000), {"step": step}, keep=2)
        os.write(acknowledge, step.to_bytes(8, "little"))


def test_twenty_kills_lose_no_acknowledged_checkpoint(tmp_path, children):
    said, rng, acknowledged, caught_half = tmp_path / "said", random.Random(0), 0, 0
    for _ in range(20):
        before = said.stat().st_size if said.exists() else 0
        pid = children.start(save_for_ever, tmp_path, said, acknowledged + 1_000 - acknowledged % 1_000)
        child.until(lambda before=before: said.exists() and said.stat().st_size > before)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(pid, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        acknowledged = int.from_bytes(said.read_bytes()[-8:], "little")
        caught_half += any(name.startswith(".tmp-") for name in names(tmp_path))
        found = latest(tmp_path)
        assert found.step >= acknowledged and found.state == {"step": found.step} and found.skipped == ()
        for name, group in groups(found.step, size=100_000).items():
            back = found.tensors(name)
            assert all(torch.equal(back[key], value) for key, value in group.items())
    assert (
        acknowledged > 20_000 and caught_half >= 1
    )  # the kills did hit the middle of a save; the test after this hits every part
    write(tmp_path, acknowledged + 10**6, keep=1)
    assert len(names(tmp_path)) == 1


def save_and_die(run: str, limit: int) -> None:
    """A save that also replaces and prunes, killed before the system call number `limit` of those that change the disk."""
    count = 0

    def counted(real):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count > limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    save(run, 300, groups(300), {"step": 300, "again": True}, keep=1)


def test_a_kill_at_every_system_step_of_a_save_leaves_one_that_verifies(tmp_path, children):
    """Not at random moments but at each: before every fsync, rename and removal of a save that also replaces and prunes."""
    points, status = 0, -signal.SIGKILL
    while status:
        run = tmp_path / f"run-{points}"
        write(run, 100, 200, 300)
        status = children.call(save_and_die, run, points)
        assert status in (0, -signal.SIGKILL), children.said()
        found = latest(run)
        assert found.step == 300 and found.skipped == ()
        for step, folder in checkpoints._candidates(run / "checkpoints"):  # nor is half an old one left under its name
            checkpoints.verify(folder, step)
        write(run, 400, keep=1)
        assert names(run) == ["step-000400"]
        shutil.rmtree(run)
        points += 1
    assert points > 16
