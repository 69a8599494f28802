"""files: what a kill, a full disk or a second process can and cannot do to what was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import child
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preftune import files
from preftune.errors import DataError, DiskError, NumericsError, UsageError

ROOT = Path(__file__).parents[1]


def limited(limit: int) -> None:
    """No file of this process may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


# --- whole files -------------------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_text_and_bytes(tmp_path):
    path = tmp_path / "a.txt"
    files.atomic_write(path, "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode()
    files.atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_file_obeys_the_umask(tmp_path):
    files.atomic_write(tmp_path / "a", "x")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    files.atomic_write(path, "old")

    def write(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskError, match=r"a: cannot be written: the disk is full .*free.*intact"):
        files.publish_file(path, write)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def write_too_much(path: str) -> None:
    limited(4096)
    with pytest.raises(DiskError, match=r"a: cannot be written: larger than a file may be here \(97\.7 KiB needed"):
        files.atomic_write(path, b"x" * 100_000)


def test_a_real_limit_on_the_file_size_is_a_disk_error(tmp_path, children):
    path = tmp_path / "a"
    files.atomic_write(path, "old")
    assert children.call(write_too_much, path) == 0, children.said()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_says_how_much_is_missing():
    needed = files.free_bytes("/") + 3 * 1024**3
    said = str(files.disk_error(OSError(errno.ENOSPC, "x"), "/run/model", needed=needed))
    assert said.startswith("/run/model: cannot be written: the disk is full") and " GiB missing" in said


@pytest.mark.parametrize(("code", "words"), [(errno.EACCES, "no permission"), (errno.EROFS, "read-only"), (errno.EDQUOT, "quota"),
                                             (errno.ENOTDIR, "not a directory")])  # fmt: skip
def test_each_system_error_is_told_in_words(code, words):
    assert words in str(files.disk_error(OSError(code, os.strerror(code)), "/x"))


def test_names_are_on_the_disk_in_the_right_order(tmp_path, monkeypatch):
    """SIGKILL cannot show a missing fsync, so the order of the calls is read: bytes, then the name, then the folder."""
    calls = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", str(b))), real_replace(a, b)))
    files.atomic_write(tmp_path / "a", "x")
    kinds = [(kind, Path(name).name) for kind, name in calls]
    assert [kind for kind, _ in kinds] == ["fsync", "replace", "fsync"]
    assert kinds[0][1].startswith(".tmp-a@") and kinds[1][1] == "a" and kinds[2][1] == tmp_path.name


def test_a_line_is_on_the_disk_before_the_append_returns(tmp_path, monkeypatch):
    calls = []
    real_data, real_sync = os.fdatasync, os.fsync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append("line"), real_data(fd)))
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("folder"), real_sync(fd)))
    files.append_jsonl(tmp_path / "m.jsonl", {"a": 1})
    files.append_jsonl(tmp_path / "m.jsonl", {"a": 2})
    assert calls == ["line", "folder", "line"]


def die_writing(path: str) -> None:
    files.publish_file(path, lambda temporary: (temporary.write_bytes(b"x" * 999), os.kill(os.getpid(), signal.SIGKILL)))


def test_the_temporary_of_a_killed_writer_is_removed_by_the_next(tmp_path, children):
    path = tmp_path / "column.npy"
    assert children.call(die_writing, path) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1 and not path.exists()
    elsewhere = tmp_path / ".tmp-column.npy@another-host-1"
    elsewhere.write_text("still writing")
    files.atomic_write(path, b"y")
    assert sorted(os.listdir(tmp_path)) == [elsewhere.name, "column.npy"]


# --- JSON --------------------------------------------------------------------------------------------------------------------


def test_json_goes_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "ü": {"x": "\n"}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_no_number_that_is_not_json_is_written(tmp_path, bad):
    with pytest.raises(NumericsError, match="not finite"):
        files.write_json(tmp_path / "a.json", bad)
    with pytest.raises(NumericsError, match="not finite"):
        files.append_jsonl(tmp_path / "b.jsonl", {"x": bad})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("text", "words"), [
    ('{"a": 1,\n "b": }', "a.json:2: not valid JSON"), ('{"a": 1, "a": 2}', "key twice in one object: 'a'"),
    ('{"a": NaN}', "not a JSON number: NaN"), ('{"a": 1e999}', "number too large"), ("[" * 100_000, "not valid JSON"),
    ("1" * 5000, "not valid JSON"), ("", "not valid JSON"),
])  # fmt: skip
def test_json_that_is_wrong_is_a_data_error(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as caught:
        files.read_json(tmp_path / "a.json")
    assert words in str(caught.value)


def test_json_that_is_missing_or_not_text_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"a\.json: no such file"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8 at byte 7"):
        files.read_json(tmp_path / "a.json")


# --- lines -------------------------------------------------------------------------------------------------------------------


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "m.jsonl"
    assert files.read_jsonl(path) == []
    rows = [{"step": i, "text": "a\nb\u2028c"} for i in range(5)]
    for row in rows:
        files.append_jsonl(path, row)
    assert files.read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == 5


@given(cut=st.integers(0, 200))
def test_a_torn_last_line_is_dropped_and_then_removed(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "m.jsonl"
    rows = [{"step": i, "loss": i / 7} for i in range(4)]
    for row in rows:
        files.append_jsonl(path, row)
    whole = path.read_bytes()
    cut = min(cut, len(whole))
    path.write_bytes(whole[:cut])
    left = whole[:cut].count(b"\n")
    assert files.read_jsonl(path) == rows[:left]
    files.append_jsonl(path, {"step": 9})
    assert files.read_jsonl(path) == [*rows[:left], {"step": 9}]


def test_a_torn_line_longer_than_a_block_is_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 200_000)
    files.append_jsonl(path, {"c": 2})
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_a_bad_line_before_the_last_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: not valid JSON"):
        files.read_jsonl(path)
    path.write_text('{"a": 1}\n[2]\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a JSON object"):
        files.read_jsonl(path)


def append_too_much(path: str) -> None:
    limited(4096)
    with pytest.raises(DiskError, match=r"m\.jsonl: cannot be written"):
        files.append_jsonl(path, {"step": 2, "text": "x" * 9000})


def test_an_append_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, children):
    path = tmp_path / "m.jsonl"
    files.append_jsonl(path, {"step": 1})
    before = path.read_bytes()
    assert children.call(append_too_much, path) == 0, children.said()
    assert path.read_bytes() == before


def append_for_ever(path: str, said: str, step: int) -> None:
    """Append lines; a step is acknowledged in `said`, 8 bytes each, only after the append has returned."""
    acknowledge = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        files.append_jsonl(path, {"step": step, "text": "x" * 3000})
        os.write(acknowledge, step.to_bytes(8, "little"))
        step += 1


def test_no_acknowledged_line_is_lost_to_a_kill(tmp_path, children):
    path, said = tmp_path / "m.jsonl", tmp_path / "said"
    for round_ in range(5):
        first = round_ * 1_000_000
        said.unlink(missing_ok=True)
        pid = children.start(append_for_ever, path, said, first)
        child.until(lambda lines=10 + round_: said.exists() and said.stat().st_size >= 8 * lines)
        os.kill(pid, signal.SIGKILL)
        assert children.wait() == -signal.SIGKILL
        last = int.from_bytes(said.read_bytes()[-8:], "little")
        steps = [row["step"] for row in files.read_jsonl(path)]
        assert last in steps and steps == sorted(set(steps))
        assert [s for s in steps if s >= first][: last - first + 1] == list(range(first, last + 1))


# --- hashes ------------------------------------------------------------------------------------------------------------------


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_fingerprint_is_the_same_in_another_process_and_with_other_hash_seeds():
    program = ("import numpy as np; from preftune.files import fingerprint; "
               "print(fingerprint('a', {'x': 1, 'y': [None, 2.5]}, np.arange(6, dtype='<i4').reshape(2, 3)))")  # fmt: skip
    seen = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}  # fmt: skip
    assert len(seen) == 1
    assert seen.pop().strip() == files.fingerprint("a", {"y": [None, 2.5], "x": 1}, np.arange(6, dtype="<i4").reshape(2, 3))


def test_different_things_have_different_fingerprints():
    zeros = np.zeros(4, np.float32)
    things = [(), (1,), (1.0,), (True,), ("1",), (None,), ("null",), ([1, 2],), ([1], 2), (1, 2), (1, 23), (12, 3),
              ({"a": 1},), ({"a": 2},), (["a", 1],),
              ("ab", "c"), ("a", "bc"), ([],), ({},), ("",), (zeros,), (zeros.reshape(2, 2),), (zeros.view(np.int32),),
              (zeros.astype(np.float64),), (zeros[:3],), (zeros[:0],), (zeros.reshape(2, 2)[:, :0],),
              (np.array([1.0, 2.0]),), (np.array([2.0, 1.0]),)]  # fmt: skip
    assert len({files.fingerprint(*thing) for thing in things}) == len(things)


def test_a_fingerprint_sees_values_not_memory_layout():
    grid = np.arange(12).reshape(3, 4)
    assert files.fingerprint(grid.T) == files.fingerprint(np.ascontiguousarray(grid.T))
    assert files.fingerprint((1, 2)) == files.fingerprint([1, 2])


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3), max_leaves=8)


@given(VALUES)
def test_a_fingerprint_survives_json(value):
    assert files.fingerprint(value) == files.fingerprint(json.loads(json.dumps(value)))


def test_what_has_no_stable_bytes_is_refused():
    for thing in (object(), {1, 2}, np.array([object()])):
        with pytest.raises(AssertionError):
            files.fingerprint(thing)


# --- folders -----------------------------------------------------------------------------------------------------------------


def be_refused(folder: str, holder: int) -> None:
    words = f"process {holder} on {socket.gethostname()} works in this run folder"
    with pytest.raises(DiskError, match=words), files.run_lock(folder):
        pass


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path, children):
    with files.run_lock(tmp_path):
        assert children.call(be_refused, tmp_path, os.getpid()) == 0, children.said()
        with pytest.raises(DiskError), files.run_lock(tmp_path):  # nor this process, twice
            pass
    with files.run_lock(tmp_path):
        pass


def die_holding(folder: str) -> None:
    with files.run_lock(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, children):
    assert children.call(die_holding, tmp_path) == -signal.SIGKILL
    assert json.loads((tmp_path / files.LOCK).read_text())["pid"]  # its stamp is still there
    with files.run_lock(tmp_path):
        pass


def test_a_torn_stamp_is_taken_over_and_another_host_is_believed(tmp_path):
    (tmp_path / files.LOCK).write_text('{"pid": 12')
    with files.run_lock(tmp_path):
        pass
    (tmp_path / files.LOCK).write_text('{"pid": 12, "host": "far-away"}')
    with pytest.raises(DiskError, match=r"process 12 on far-away .* delete .*\.lock"), files.run_lock(tmp_path):
        pass
    assert json.loads((tmp_path / files.LOCK).read_text())["host"] == "far-away"


def test_where_the_file_system_has_no_locks_the_stamp_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    with files.run_lock(tmp_path), pytest.raises(DiskError), files.run_lock(tmp_path):
        pass
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / files.LOCK).write_text(json.dumps({"pid": gone.pid, "host": socket.gethostname()}))
    with files.run_lock(tmp_path):
        pass


def test_an_error_inside_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), files.run_lock(tmp_path):
        raise KeyError
    with files.run_lock(tmp_path):
        pass


def test_new_folder(tmp_path):
    assert files.new_folder(tmp_path / "a" / "b").is_dir()
    assert files.new_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"  # empty: taken
    (tmp_path / "a" / "b" / "model").touch()
    with pytest.raises(UsageError, match=r"b: not empty \(holds model\).*--resume"):
        files.new_folder(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is a file"):
        files.new_folder(tmp_path / "a" / "b" / "model")
    with pytest.raises(DiskError):
        files.new_folder(tmp_path / "a" / "b" / "model" / "c")


def test_free_bytes_of_a_place_that_is_not_there_yet(tmp_path):
    assert 0 < files.free_bytes(tmp_path / "x" / "y") <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


@pytest.mark.parametrize(("count", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**29, "2.5 GiB")])
def test_sizes_for_people(count, text):
    assert files.size_text(count) == text
