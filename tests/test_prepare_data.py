import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ENV, Process
from torchcodec.encoders import JpegEncoder

import media
from media import InputError
from tools import prepare_data

CLONE = Path(__file__).parent.parent
SHARED = CLONE.parent / "shared/data/videos"
SETTINGS = {
    "snippets": 4,
    "frames": 2,
    "stride": 2,
    "short_side": 32,
    "quality": 95,
    "copies": [24, 16],
    "rate": None,
}
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")


def write_jpegs(folder, values, height=32, width=48, fps=10):
    """Write a folder of frames, which needs no FFmpeg: frame i is uniformly values[i]."""
    folder.mkdir(parents=True)
    for i, value in enumerate(values):
        frame = torch.full((3, height, width), value, dtype=torch.uint8)
        JpegEncoder(frame).to_file(f"{folder}/img_{i + 1:05d}.jpg", quality=95)
    info = {"fps": fps, "duration_sec": len(values) / fps}
    (folder / "video.json").write_text(json.dumps(info))
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    return write_jpegs(tmp_path / "in/v", range(20, 220, 5))


@pytest.fixture
def videos(tmp_path, folder):
    """Three good videos and a broken one."""
    for name in ("a", "c", "d"):
        shutil.copytree(folder, tmp_path / f"in/{name}")
    shutil.rmtree(folder)
    (tmp_path / "in/b").mkdir()
    (tmp_path / "in/b/img_1.jpg").write_bytes(b"broken")
    (tmp_path / "in/b/video.json").write_text('{"fps": 10, "duration_sec": 1}')
    return media.find_media(tmp_path / "in")


def grey(frames):
    return frames.float().mean((1, 2, 3))


# -------------------------------------------------------------------------------------- one video


def test_a_zip_has_the_frames_that_full_fidelity_needs_and_nothing_else(folder, tmp_path):
    assert prepare_data.prepare_video(folder, f"{tmp_path}/v.zip", SETTINGS) is None
    # Centres 5, 15, 25, 35; two frames, 2 apart, around each.
    needed = [4, 6, 14, 16, 24, 26, 34, 36]
    assert media.snippet_frames(40, 4, 2, 2).flatten().tolist() == needed
    with zipfile.ZipFile(tmp_path / "v.zip") as archive:
        assert archive.testzip() is None
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
        names = [f"{side}{n:06d}.jpg" for side in ("", "24/", "16/") for n in needed]
        assert archive.namelist() == ["video.json", *names]
        info = json.loads(archive.read("video.json"))
    assert info["frames"] == needed and info["times_sec"] == [n / 10 for n in needed]
    assert (info["fps"], info["num_frames"], info["duration_sec"]) == (10, 40, 4)
    video = media.open_media(f"{tmp_path}/v.zip")
    assert (video.num_frames, video.fps, video.duration, video.note) == (40, 10, 4.0, None)
    assert video.prepared == SETTINGS
    expected = torch.tensor([200, 40, 40, 40, 200, 140, 100])
    assert (grey(video.read([36, 4, 4, 0, 39, 20, 15])) - expected).abs().max() < 2
    assert abs(grey(video.read([26], 16)) - 150) < 2
    assert [video.read([4], side).shape[2] for side in (None, 32, 24, 16)] == [32, 32, 24, 16]
    # The same frames, the same bytes.
    prepare_data.prepare_video(folder, f"{tmp_path}/again.zip", SETTINGS)
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "v.zip").read_bytes()


def test_a_rate_asks_for_as_many_snippets_as_the_video_has_seconds(folder, tmp_path):
    # 4 s: 2 snippets, centres 10 and 30.
    prepare_data.prepare_video(folder, f"{tmp_path}/v.zip", {**SETTINGS, "rate": 0.5})
    assert media.open_media(f"{tmp_path}/v.zip").kept.tolist() == [9, 11, 29, 31]
    with pytest.raises(InputError, match=r"rate 0.5, now 1"):
        prepare_data.prepare_once((folder, f"{tmp_path}/v.zip", {**SETTINGS, "rate": 1}))


def test_small_videos_keep_their_size_and_get_only_smaller_copies(folder, tmp_path):
    settings = {**SETTINGS, "short_side": 100, "copies": [20, 50, 32]}
    prepare_data.prepare_video(folder, f"{tmp_path}/v.zip", settings)
    video = media.open_media(f"{tmp_path}/v.zip")
    assert video.read([4]).shape[2:] == (32, 48) and video.read([4], 20).shape[2:] == (20, 30)
    assert video.short_sides == [100, 20]


def test_a_folder_without_a_frame_rate_is_refused(folder, tmp_path):
    os.remove(f"{folder}/video.json")
    with pytest.raises(InputError, match=r"tells no frame rate: add a video.json"):
        prepare_data.prepare_video(folder, f"{tmp_path}/v.zip", SETTINGS)


@needs_ffmpeg
@pytest.mark.parametrize("count, height, width", [(1, 32, 48), (3, 33, 51), (5, 67, 45)])
def test_short_videos_of_odd_sizes(tmp_path, count, height, width):
    write_jpegs(tmp_path / "in", range(50, 50 + 40 * count, 40), height, width)
    source = ["-framerate", "10", "-i", f"{tmp_path}/in/img_%05d.jpg"]
    codec = ["-c:v", "mpeg4", "-q:v", "2"]
    subprocess.run(["ffmpeg", "-v", "error", *source, *codec, f"{tmp_path}/v.mkv"], check=True)
    prepare_data.prepare_video(f"{tmp_path}/v.mkv", f"{tmp_path}/v.zip", SETTINGS)
    for path in ("v.mkv", "v.zip"):
        video = media.open_media(f"{tmp_path}/{path}")
        assert video.num_frames == count
        assert video.duration == pytest.approx(count / 10, rel=0.02)
        frames = video.read(media.snippet_frames(count, 4, 2, 2).flatten().numpy(), 32)
        assert frames.shape[:2] == (8, 3) and min(frames.shape[2:]) == 32
        longer = max(height, width) * 32 / min(height, width)
        assert abs(max(frames.shape[2:]) - longer) <= 0.5
        assert abs(grey(frames)[0] - 50) < 3 and abs(grey(frames)[-1] - (10 + 40 * count)) < 3


@needs_ffmpeg
def test_a_truncated_video_is_prepared_with_a_note(tmp_path):
    noise = ["-f", "lavfi", "-i", "testsrc=size=64x48:rate=10,noise=alls=100:allf=t"]
    codec = ["-t", "5", "-g", "5", "-c:v", "mpeg4", "-q:v", "2"]
    subprocess.run(["ffmpeg", "-v", "error", *noise, *codec, f"{tmp_path}/v.mkv"], check=True)
    content = (tmp_path / "v.mkv").read_bytes()
    (tmp_path / "v.mkv").write_bytes(content[: int(len(content) * 0.95)])
    settings = {**SETTINGS, "snippets": 50}
    note = prepare_data.prepare_video(f"{tmp_path}/v.mkv", f"{tmp_path}/v.zip", settings)
    assert "of the 5.00 s" in note and "replaced by their neighbours" in note
    video = media.open_media(f"{tmp_path}/v.zip")
    assert video.num_frames == 50 and 44 <= video.kept[-1] < 49 and video.note == note
    assert torch.equal(video.read([49]), video.read(video.kept[-1:]))


@needs_ffmpeg
def test_a_real_damaged_file_is_refused(tmp_path):
    if not (SHARED / "corrupted.mp4").exists():
        pytest.skip("no corrupted.mp4 here")
    settings = {**SETTINGS, "snippets": 100}
    with pytest.raises(InputError, match=r"corrupted.mp4 is damaged: only 28 of the 50 frames"):
        prepare_data.prepare_video(SHARED / "corrupted.mp4", f"{tmp_path}/v.zip", settings)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------ many videos


def test_a_broken_video_does_not_stop_the_others_and_a_second_run_goes_on(videos, tmp_path):
    out = tmp_path / "out"
    logged = []
    made, failed = prepare_data.prepare(videos, str(out), SETTINGS, 0, logged.append)
    assert made == ["a", "c", "d"] and list(failed) == ["b"]
    assert "img_1.jpg is not a valid JPEG" in failed["b"] and logged == [f"FAILED b: {failed['b']}"]
    assert sorted(os.listdir(out)) == ["a.zip", "c.zip", "d.zip"]
    stamps = {name: (out / name).stat().st_mtime_ns for name in ("a.zip", "d.zip")}
    os.remove(out / "c.zip")
    assert prepare_data.prepare(videos, str(out), SETTINGS, 0, logged.append)[0] == ["c"]
    assert all((out / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


def test_nothing_is_written_over(videos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.zip").write_text("the user's")
    (out / "c.zip").symlink_to("/nowhere")
    prepare_data.prepare({"d": videos["d"]}, str(out), SETTINGS, 0)
    settings = {**SETTINGS, "stride": 3}
    made, failed = prepare_data.prepare(videos, str(out), settings, 0, lambda message: None)
    assert made == [] and sorted(failed) == ["a", "b", "c", "d"]
    assert (out / "a.zip").read_text() == "the user's" and os.path.islink(out / "c.zip")
    assert "d.zip exists, prepared with other settings (stride 2, now 3)" in failed["d"]
    assert media.open_media(f"{out}/d.zip").prepared == SETTINGS


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = socket.gethostname()
    # Of processes of other machines nothing is known.
    stays = {
        f"v.zip.part-{host}-{dead.pid}": False,
        f"v.zip.part-{host}-{os.getpid()}": True,
        f"v.zip.part-elsewhere-{dead.pid}": True,
        f"lecture.part-{dead.pid}": True,
        # Not made here: a split archive, somebody's notes.
        f"film.zip.part-{dead.pid}": True,
        f"notes.json.part-{dead.pid}": True,
    }
    for name in stays:
        (tmp_path / name).touch()
    prepare_data.remove_stale_parts(tmp_path, prepare_data.HOST)
    assert {name: (tmp_path / name).exists() for name in stays} == stays


def test_what_the_rest_takes_is_told_and_a_small_disk_stops_the_work(tmp_path, monkeypatch):
    for i in range(12):
        write_jpegs(tmp_path / f"in/{i:02d}", range(i, i + 40))
    videos, out = media.find_media(tmp_path / "in"), str(tmp_path / "out")
    free = 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    logged = []
    made, failed = prepare_data.prepare(videos, out, SETTINGS, 0, logged.append)
    assert len(made) == 12 and not failed
    assert [line.partition(":")[0] for line in logged] == ["5 of 12 prepared", "10 of 12 prepared"]
    size = sum(os.path.getsize(f"{out}/{name}") for name in os.listdir(out))
    told = [float(line.split()[7]) for line in logged]
    assert told == pytest.approx([size / 1e9] * 2, rel=0.1) and "0.0 h to go" in logged[0]

    shutil.rmtree(out)
    # 7 of 12 are left, then 2; but another machine has twelve to write to this disk.
    free = size * 7 // 12
    made, _ = prepare_data.prepare(videos, out, SETTINGS, 0, logged.append)
    assert len(made) == 12
    shutil.rmtree(out)
    others = [f"other-{i}" for i in range(12)]
    with pytest.raises(InputError, match=r"out: about \S+ GB more needed, \S+ GB free: make room"):
        prepare_data.prepare(videos, out, SETTINGS, 0, logged.append, others)
    assert len(os.listdir(out)) == 5
    # That one is done: what it wrote needs no more room.
    for name in others:
        Path(f"{out}/{name}.zip").touch()
    made, _ = prepare_data.prepare(videos, out, SETTINGS, 0, logged.append, others)
    assert len(made) == 7 and logged[-1].startswith("5 of 7 prepared")


FULL_DISK = """
import ctypes, subprocess, sys
out, *options = sys.argv[1:]
assert not ctypes.CDLL(None).unshare(0x20000)  # of this process alone
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", out], check=True)
from tools import prepare_data
sys.exit(prepare_data.main(["--out", out, *options]))
"""


def test_a_full_disk_ends_the_work_in_one_line(videos, tmp_path):
    (tmp_path / "out").mkdir()
    options = ["--videos", tmp_path / "in", "--workers", "0"]
    process = Process("-c", FULL_DISK, tmp_path / "out", *options)
    errors = process.communicate()[1]
    if "AssertionError" in errors:
        pytest.skip("unshare is not permitted")
    assert process.returncode == 1 and errors.count("\n") == 1
    assert "out: the disk or your quota is full: make room" in errors


def test_shards_are_disjoint_and_complete_and_stay_when_videos_come(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(40):
        (tmp_path / f"in/v_{i}.mp4").touch()
    subsets = {f"{i}": "training" for i in range(50)}  # ten are missing
    folders = ["--videos", f"{tmp_path}/in", "--out", f"{tmp_path}/out"]

    def parts(count, *options):
        command = [*folders, *options]
        args = [prepare_data.parse_args(command) for _ in range(count)]
        for i, one in enumerate(args, 1):
            one.shard = prepare_data.read_shard(f"{i}/{count}")
        found = [prepare_data.find_videos(one) for one in args]
        everything = {name for videos, _, _ in found for name in videos}
        assert all(others == everything - videos.keys() for videos, others, _ in found)
        return [(videos, missing) for videos, _, missing in found]

    before = parts(3)
    names = [name for found, _ in before for name in found]
    assert sorted(names) == sorted(media.find_media(tmp_path / "in"))
    assert all(len(found) > 5 and not missing for found, missing in before)
    annotations = write_annotations(tmp_path / "a.json", subsets)
    told = parts(3, "--annotations", annotations)
    assert sorted(name for _, missing in told for name in missing) == [
        str(i) for i in range(40, 50)
    ]
    # The spelling does not matter, nor what comes later.
    assert [{f"v_{name}" for name in found} for found, _ in told] == [set(f) for f, _ in before]
    (tmp_path / "in/v_99.mp4").touch()
    assert all(set(old) <= set(new) for (old, _), (new, _) in zip(before, parts(3), strict=True))
    # More machines than videos: one without work has done it.
    shutil.rmtree(tmp_path / "in")
    write_jpegs(tmp_path / "in/a", range(8))
    statuses = [run(capsys, *folders, "--workers", "0", "--shard", f"{i}/3") for i in (1, 2, 3)]
    assert [status for status, _ in statuses] == [0, 0, 0]
    assert sum("1 prepared" in printed for _, printed in statuses) == 1


# ---------------------------------------------------------------------------------- command line


def command_line(tmp_path, *options):
    folders = ["--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    return ["-m", "tools.prepare_data", *folders, *options]


def test_kill_9_while_preparing_leaves_nothing_that_passes_for_whole(videos, tmp_path):
    out = tmp_path / "out"
    options = "--snippets 40 --frames-per-snippet 2 --stride 1 --short-side 32 --workers 0 --copies"
    command = [sys.executable, *command_line(tmp_path, *options.split())]
    process = subprocess.Popen(command, cwd=CLONE, env=ENV, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if out.is_dir() and os.listdir(out):
            break
        time.sleep(0.001)
    process.kill()
    process.wait()
    left = os.listdir(out)
    whole = [name[:-4] for name in left if name.endswith(".zip")]
    assert left and all(len(media.open_media(f"{out}/{name}.zip").kept) == 40 for name in whole)
    settings = {"snippets": 40, "frames": 2, "stride": 1, "short_side": 32, "quality": 90}
    settings = {**settings, "copies": [], "rate": None}
    made, failed = prepare_data.prepare(videos, str(out), settings, 0, lambda message: None)
    assert list(failed) == ["b"] and sorted(made + whole) == ["a", "c", "d"]
    assert sorted(os.listdir(out)) == ["a.zip", "c.zip", "d.zip"]


def children_of(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def is_running(pid):
    """Return whether a process is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_ends_the_workers_at_once(videos, tmp_path, name):
    process = Process(*command_line(tmp_path, "--workers", "2"))
    deadline = time.monotonic() + 60
    children = []
    # Two workers and multiprocessing's resource tracker.
    while len(children) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        children = children_of(process.pid)
    time.sleep(0.2)
    # Ctrl-C reaches the whole group, a scheduler's SIGTERM may not.
    send = os.killpg if name == "SIGINT" else os.kill
    send(process.pid, signal.Signals[name])
    assert process.communicate(timeout=60)[1].splitlines() == [
        "tools.prepare_data: interrupted; rerun the same command to resume"
    ]
    assert process.returncode == 1 and len(children) == 3
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))


def write_annotations(path, subsets):
    entries = {
        name: {"subset": subset, "duration": 10.0, "annotations": []}
        for name, subset in subsets.items()
    }
    path.write_text(json.dumps({"database": entries}))
    return str(path)


def run(capsys, *command):
    """Return the exit status of the program and what it printed."""
    try:
        status = prepare_data.main([str(x) for x in command])
    except SystemExit as error:
        return 1, str(error.code)
    return status, capsys.readouterr().out


def test_the_annotated_videos_are_prepared_and_what_failed_is_told(tmp_path, capsys):
    for name in ("a", "v_b", "other"):
        write_jpegs(tmp_path / f"in/{name}", range(8), fps=8)
    (tmp_path / "in/v_b/img_00002.jpg").write_bytes(b"broken")
    subsets = {"a": "training", "b": "training", "c": "validation"}
    annotations = write_annotations(tmp_path / "a.json", subsets)
    options = "--snippets 2 --frames-per-snippet 2 --stride 1 --short-side 16 --workers 0"
    command = ["--videos", tmp_path / "in", "--out", tmp_path / "out", *options.split()]
    command += ["--annotations", annotations]
    status, printed = run(capsys, *command)
    assert status == 1
    assert "1 of 3 videos are not in" in printed
    assert "1 prepared, 0 already prepared, 1 failed, 1 missing" in printed and "  b: " in printed
    assert os.listdir(tmp_path / "out") == ["a.zip"]
    video = media.open_media(f"{tmp_path}/out/a.zip")
    assert video.kept.tolist() == [1, 2, 5, 6] and video.prepared["copies"] == [11, 8]

    _, error = run(capsys, *command, "--subsets", "validation")
    assert "none of 1 videos in" in error
    _, error = run(capsys, *command, "--subsets", "test")
    assert "no subset ['test']" in error
    _, printed = run(capsys, *command, "--copies")
    assert "prepared with other settings (copies [11, 8], now [])" in printed


def test_wrong_options_are_one_line_each(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    write_jpegs(tmp_path / "in/v", range(8))
    wrong = {
        f"--out {tmp_path}/file": "cannot write to a folder",
        f"--out {tmp_path}/file/out": "cannot write to a folder",
        "--workers -1": "--workers -1: expected 0 or more",
        "--quality 0": "expected numbers of at least 1",
        "--quality 101": "a quality up to 100",
        "--copies 100 0": "expected numbers of at least 1",
        "--rate 0": "--rate 0.0: expected a number above 0",
        "--shard 0/2": "--shard 0/2: expected i/n, from 1/n to n/n",
        "--shard 3/2": "--shard 3/2: expected i/n",
        "--shard 1": "--shard 1: expected i/n",
        f"--videos {tmp_path}/none": "no folder",
        f"--annotations {tmp_path}/none.json": "none.json",
    }
    for options, message in wrong.items():
        command = ["--videos", tmp_path / "in", "--out", tmp_path / "out", *options.split()]
        status, error = run(capsys, *command)
        assert status == 1 and message in error and "\n" not in error
        assert error.startswith("tools.prepare_data: ")


@pytest.mark.parametrize("out", ["in", "in/out", "in/deep/out"])
def test_out_may_be_in_the_folder_of_the_videos(tmp_path, capsys, out):
    write_jpegs(tmp_path / "in/v", range(8), fps=8)
    command = ["--videos", tmp_path / "in", "--out", tmp_path / out, "--snippets", "2"]
    for counts in ("1 prepared, 0 already prepared", "0 prepared, 1 already prepared"):
        status, printed = run(capsys, *command, "--workers", "0")
        assert status == 0 and f"{counts}, 0 failed" in printed
