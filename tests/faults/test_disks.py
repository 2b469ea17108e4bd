"""Disks that are full, read-only or rotten: one line says so, and what was saved stays whole."""

import os
import random
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jobs
import pytest

from vit_attn.training.checkpoint import load_checkpoint


def go_on(folder, undisturbed):
    ended = jobs.run(folder, *jobs.EVERYTHING)
    assert ended.status == 0, ended.said
    jobs.assert_same(folder, undisturbed)
    return ended.said


def last_line(ended):
    """What a command that failed said of it, which is one line on top of what it had logged."""
    assert ended.status == 2, ended.said
    assert "Traceback" not in ended.said
    return ended.said.splitlines()[-1]


# Checkpoints that the disk has spoilt


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that was stopped in its second epoch, with two checkpoints."""
    ended = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[jobs.BeforeBatch(15, partial(os._exit, 7))])
    assert ended.status == 7, ended.said
    return tmp_path


@dataclass
class Spoil:
    """Cut a file short, or turn over one bit of it."""

    how: str

    def __call__(self, path: Path):
        content = bytearray(path.read_bytes())
        place = random.Random(len(self.how)).randrange(len(content))
        if self.how == "cut short":
            content = content[:place]
        elif self.how == "emptied":
            content = content[:0]
        else:
            content[place] ^= 1 << 3
        path.write_bytes(bytes(content))


@pytest.mark.faults("last checkpoint torn, emptied or with a bit turned over")
@pytest.mark.parametrize(
    "how", ["one bit", pytest.param("cut short", marks=jobs.SLOW), pytest.param("emptied", marks=jobs.SLOW)]
)
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_used(stopped, undisturbed, how):
    last = jobs.folder_of(stopped) / "checkpoints" / "last.ckpt"
    steps = [load_checkpoint(last.with_name(name))["global_step"] for name in ("previous.ckpt", "last.ckpt")]
    assert steps == [5, 6]
    Spoil(how)(last)
    spoilt = last.read_bytes()
    said = go_on(stopped, undisturbed)
    assert f"{last} is broken: set aside as last.ckpt.broken; previous.ckpt is used" in said
    assert "previous.ckpt at step 5" in said
    assert last.with_name("last.ckpt.broken").read_bytes() == spoilt


@pytest.mark.slow
@pytest.mark.faults("both checkpoints broken")
def test_two_broken_checkpoints_are_left_where_they_are_for_the_user_to_decide(stopped):
    checkpoints = jobs.folder_of(stopped) / "checkpoints"
    for name in ("last.ckpt", "previous.ckpt"):
        Spoil("cut short")(checkpoints / name)
    before = {path: path.read_bytes() for path in jobs.folder_of(stopped).rglob("*") if path.is_file()}
    message = last_line(jobs.run(stopped, *jobs.EVERYTHING))
    assert "last.ckpt and" in message
    assert "overwrite=true starts the run anew" in message
    assert {path: path.read_bytes() for path in jobs.folder_of(stopped).rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.faults("best checkpoint torn before it is scored")
def test_a_broken_best_checkpoint_is_set_aside_and_the_last_one_scored(tmp_path):
    best = jobs.folder_of(tmp_path) / "checkpoints" / "best.ckpt"
    ended = jobs.run(tmp_path, *jobs.EVERYTHING, faults=[partial(spoil_before_scoring, best)])
    assert ended.status == 0, ended.said
    assert f"{best} is broken: set aside as best.ckpt.broken; last.ckpt is used" in ended.said


def spoil_before_scoring(best):
    import vit_attn.training.run as module

    score = module._score

    def spoilt(*args, **kwargs):
        Spoil("cut short")(best)
        return score(*args, **kwargs)

    module._score = spoilt


# Disks that take nothing


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk(kilobytes)`` mounts a disk of that size and returns its folder; given twice, it changes the size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kilobytes, mode="rw"):
        again = "remount," if os.path.ismount(place) else ""
        options = f"{again}{mode},size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a small disk: run as root")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.faults("disk full at a checkpoint")
def test_a_full_disk_at_a_save_keeps_the_checkpoint_before(small_disk, undisturbed):
    size = (jobs.folder_of(undisturbed) / "checkpoints" / "last.ckpt").stat().st_size // 1024
    disk = small_disk(int(2.5 * size))  # two checkpoints and a half
    message = last_line(jobs.run(disk, *jobs.EVERYTHING))
    last = jobs.folder_of(disk) / "checkpoints" / "last.ckpt"
    best = last.with_name("best.ckpt")
    assert message == (
        f"error: checkpoint {best} cannot be written: No space left on device; {last}, written before, is whole. "
        "Once that is mended, the same command goes on from there"
    )
    assert load_checkpoint(last)["global_step"] == 4
    small_disk(10 * size)
    assert "last.ckpt at step 4" in go_on(disk, undisturbed)


def fill(disk):
    """Leave not a byte of a disk free."""
    block = bytes(4096)
    with (disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(block):
                pass
        except OSError:
            pass


@pytest.mark.slow
@pytest.mark.faults("disk full at a log")
def test_a_full_disk_at_a_log_keeps_the_log(small_disk, undisturbed):
    disk = small_disk(8 * (jobs.folder_of(undisturbed) / "checkpoints" / "last.ckpt").stat().st_size // 1024)
    # In the second epoch, a step after a checkpoint.
    ended = jobs.run(disk, *jobs.EVERYTHING, faults=[jobs.BeforeBatch(14, partial(fill, disk))])
    csv = jobs.folder_of(disk) / "logs" / "metrics.csv"
    assert last_line(ended).startswith(
        f"error: {csv} cannot be written: No space left on device; what it held is whole"
    )
    assert [row["step"] for row in jobs.rows(disk)][:5] == ["0", "1", "2", "3", "4"]
    (disk / "ballast").unlink()
    go_on(disk, undisturbed)


@pytest.mark.faults("read-only disk or folder")
def test_a_read_only_disk_is_one_line_before_any_work(small_disk):
    disk = small_disk(100)
    small_disk(100, "ro")
    ended = jobs.run(disk.parent, *jobs.EVERYTHING, f"experiments_dir={disk}")
    assert "cannot be written" in last_line(ended)
    assert len(ended.said.splitlines()) == 1
    small_disk(100)
    assert list(disk.iterdir()) == []


def become_nobody():
    os.setgid(65534)
    os.setuid(65534)


@pytest.mark.faults("read-only disk or folder")
def test_a_folder_that_somebody_else_owns_is_one_line_before_any_work(tmp_path, tmp_path_factory):
    if os.getuid():
        become = ()
        tmp_path.chmod(0o555)
    else:
        become = (become_nobody,)
        for folder in (tmp_path, *tmp_path.parents):  # nobody may go down to it
            if folder.stat().st_mode & 0o005 != 0o005:
                folder.chmod(0o755)
    runs = tmp_path / "runs"
    runs.mkdir(exist_ok=True, mode=0o555)
    ended = jobs.run(tmp_path_factory.mktemp("said"), *jobs.EVERYTHING, f"experiments_dir={runs}", faults=become)
    assert last_line(ended) == (
        f"error: the run folder {runs}/default/run cannot be written: {runs} is no writable folder"
    )
    assert list(runs.iterdir()) == []
