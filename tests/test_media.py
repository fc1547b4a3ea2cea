import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
import zipfile

import numpy as np
import pytest
import torch
from torchcodec.encoders import JpegEncoder

import check
import data
import media

SHARED = os.path.join(os.path.dirname(__file__), "../../shared/data/videos")
SETTINGS = {"snippets": 4, "frames": 2, "stride": 2, "short_side": 32, "copies": [24, 16], "quality": 95}
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="videos are made by the ffmpeg command")


def shared(name):
    path = f"{SHARED}/{name}"
    return path if os.path.exists(path) else pytest.skip(f"no {name} here")


def flat(values, h=32, w=48):
    """Frame i is uniformly values[i]."""
    return torch.as_tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, h, w).contiguous()


def encode(path, frames, *options, fps=10):
    """A video file of frames (F, 3, H, W)."""
    n, _, h, w = frames.shape
    raw = frames.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", str(fps), "-i", "-", "-c:v", "mpeg4", "-q:v", "2",
                    "-threads", "1", *options, str(path)], input=raw, check=True)
    return str(path)


def grey(frames):
    return frames.float().mean((1, 2, 3))


def noisy(n, h=48, w=64):
    """Frames that do not compress: a file breaks off where it is cut."""
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def jpeg(value, h=8, w=12, quality=95):
    return JpegEncoder(flat([value], h, w)[0]).to_tensor(quality=quality).numpy().tobytes()


# ---------------------------------------------------------------- video files

@needs_ffmpeg
def test_numbers_are_presentation_order_at_a_constant_rate_and_any_order_can_be_asked_for(tmp_path):
    values = torch.arange(40) * 5 + 20
    video = media.open_media(encode(tmp_path / "v.mp4", flat(values), "-bf", "2", "-g", "12"))  # B-frames: not in the order of the file
    assert (video.num_frames, round(video.fps, 6), round(video.duration, 6), video.note) == (40, 10, 4, None)
    numbers = [39, 0, 7, 7, 31, 12]
    assert (grey(video.read(numbers)) - values[numbers]).abs().max() < 2.5
    assert video.read([3]).shape == (1, 3, 32, 48) and video.read([3], 16).shape == (1, 3, 16, 24) and video.read([3], 99).shape == (1, 3, 32, 48)
    middle = video.read([3, 5], view=lambda x: x[4:12, 6:10])
    assert middle.shape == (2, 3, 8, 4) and (grey(middle) - values[[3, 5]]).abs().max() < 2.5


@needs_ffmpeg
def test_at_a_variable_rate_numbers_are_even_in_time(tmp_path):
    values = torch.arange(30) * 7 + 20  # 20 frames 0.1 s apart, then 10 frames 0.4 s apart: 6 s, 5 frames a second
    path = encode(tmp_path / "v.mp4", flat(values), "-vf", "settb=1/1000,setpts=if(lt(N\\,20)\\,N*0.1\\,1.97+(N-20)*0.4)/TB", "-fps_mode", "vfr",
                  "-enc_time_base", "1/1000", "-video_track_timescale", "1000")
    video = media.open_media(path)
    assert video.num_frames == 30 and 5.6 < video.duration < 6.1 and video.fps == pytest.approx(30 / video.duration)
    times = np.concatenate([np.arange(20) * 0.1, 1.97 + np.arange(10) * 0.4])
    seconds = (np.arange(30) + 0.5) / video.fps
    shown = np.searchsorted(times, seconds, side="right") - 1
    clear = np.abs(seconds[:, None] - times).min(1) > 0.01  # not at the very change from one frame to the next
    assert clear.sum() > 20 and (grey(video.read(range(30))) - values[shown]).abs()[clear].max() < 3
    media.prepare_video(path, f"{tmp_path}/v.zip", SETTINGS)
    with zipfile.ZipFile(tmp_path / "v.zip") as z:
        info = json.loads(z.read("video.json"))
    np.testing.assert_allclose(info["times_sec"], times[video.index(info["frames"])], atol=2e-3)


@needs_ffmpeg
@pytest.mark.parametrize("n, h, w", [(1, 32, 48), (3, 33, 51), (5, 67, 45)])
def test_short_videos_of_odd_sizes(tmp_path, n, h, w):
    path = encode(tmp_path / "v.mkv", flat(range(50, 50 + 40 * n, 40), h, w))
    media.prepare_video(path, f"{tmp_path}/v.zip", SETTINGS)
    for video in (media.open_media(path), media.open_media(f"{tmp_path}/v.zip")):
        assert video.num_frames == n and video.duration == pytest.approx(n / 10, rel=0.02)
        frames = video.read(media.snippet_frames(n, 4, 2, 2).flatten().numpy(), 32)
        assert frames.shape[:2] == (8, 3) and min(frames.shape[2:]) == 32 and abs(max(frames.shape[2:]) - max(h, w) * 32 / min(h, w)) <= 0.5
        assert abs(grey(frames)[0] - 50) < 3 and abs(grey(frames)[-1] - (10 + 40 * n)) < 3


@needs_ffmpeg
@pytest.mark.parametrize("kind, options", [("mp4", ["-movflags", "+faststart"]), ("avi", []), ("mkv", [])])
def test_a_file_that_breaks_off_is_used_from_90_percent_on(tmp_path, kind, options):
    whole = encode(tmp_path / f"whole.{kind}", noisy(50), "-g", "5", *options)  # its header, which comes first, tells 5 s
    size = os.path.getsize(whole)
    for name, share in (("most", 0.95), ("half", 0.5)):
        with open(whole, "rb") as f, open(tmp_path / f"{name}.{kind}", "wb") as cut:
            cut.write(f.read(int(size * share)))
    video = media.open_media(f"{tmp_path}/most.{kind}")
    assert video.num_frames == 50 and video.duration == 5 and "of the 5.00 s that its header tells" in video.note
    note = media.prepare_video(video.path, f"{tmp_path}/most.zip", {**SETTINGS, "snippets": 50})
    assert "frames decode, the others are replaced by their neighbours" in note
    kept = media.open_media(f"{tmp_path}/most.zip")
    assert kept.num_frames == 50 and 44 <= kept.kept[-1] < 49 and kept.note == note
    assert torch.equal(kept.read([49]), kept.read(kept.kept[-1:]))  # annotations count on 5 s: the last frame stays
    with pytest.raises(ValueError, match=rf"half.{kind} breaks off: its frames cover 2\.\d+ of the 5.00 s .* get it again"):
        media.open_media(f"{tmp_path}/half.{kind}")


@needs_ffmpeg
def test_what_is_built_on_a_damaged_frame_is_left_out_up_to_the_next_key_frame(tmp_path):
    options = "-c:v", "libx264", "-x264-params", "keyint=10:min-keyint=10:scenecut=0:bframes=0", "-pix_fmt", "yuv420p", "-qp", "20"
    path = encode(tmp_path / "v.mp4", noisy(60), *options)
    good = media.open_media(path)
    clean = good.read(range(60))
    with open(path, "rb") as f:
        content = f.read()
    start = content.index(b"mdat")
    start += int((len(content) - start) * 0.4)
    for size, end in ((6000, 30), (25000, 40)):  # about two frames, about eight
        (tmp_path / "bad.mp4").write_bytes(content[:start] + bytes(size) + content[start + size:])
        bad = media.open_media(f"{tmp_path}/bad.mp4")
        decoded = dict(bad.decode(range(60)))
        lost = sorted(set(range(60)) - set(decoded))
        assert lost == list(range(lost[0], end)) and 22 <= lost[0] <= 26
        assert all(torch.equal(decoded[i], clean[i]) for i in decoded if i != lost[0] - 1)  # of which FFmpeg repairs a part
        if len(lost) <= 6:
            assert torch.equal(bad.read(range(60))[lost[0]:lost[0] + 3], decoded[lost[0] - 1].expand(3, -1, -1, -1))  # the nearest stands in
        else:
            with pytest.raises(ValueError, match=f"bad.mp4: only {60 - len(lost)} of the 60 frames that are needed decode"):
                bad.read(range(60))
    assert len(lost) > 6


@needs_ffmpeg
def test_what_is_no_video_is_refused_in_one_line(tmp_path):
    with wave.open(f"{tmp_path}/sound.wav", "wb") as f:
        f.setparams((1, 2, 8000, 0, "NONE", ""))
        f.writeframes(bytes(16000))
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "empty.mp4").touch()
    for name, words in (("sound.wav", "has no video stream$"), ("text.mp4", "cannot be opened as a video .* get it again$"), ("empty.mp4", "cannot be opened")):
        with pytest.raises(ValueError, match=f"{name} {words}") as error:
            media.open_media(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value) and ".cpp" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="none.mp4"):
        media.open_media(f"{tmp_path}/none.mp4")


@needs_ffmpeg
@pytest.mark.parametrize("name, frames, duration, height, width", [
    ("v_GGSY1Qvo990.mp4", 355, 18.094, 240, 320), ("flipping_a_pancake.mkv", 310, 10.333, 240, 426), ("video_90.mov", 3, 0.1, 568, 320),
    ("h264_10bits.mp4", 30, 1.0, 200, 200), ("exercise.avi", 393, 39.3, 288, 384)])
def test_real_videos(name, frames, duration, height, width):
    video = media.open_media(shared(name))
    assert (video.num_frames, video.height, video.width, video.note) == (frames, height, width, None) and video.duration == pytest.approx(duration, abs=2e-3)
    from torchcodec.decoders import VideoDecoder
    numbers = [frames - 1, 0, frames // 2]
    assert torch.equal(video.read(numbers), torch.stack([VideoDecoder(shared(name))[i] for i in numbers]))
    small = video.read(numbers, 100)
    assert min(small.shape[2:]) == 100 and (grey(small) - grey(video.read(numbers))).abs().max() < 1


@needs_ffmpeg
def test_a_real_file_that_breaks_off_is_refused(tmp_path):
    with pytest.raises(ValueError, match="corrupted.mp4: only 28 of the 50 frames that are needed decode, expected at least 90%"):
        media.prepare_video(shared("corrupted.mp4"), f"{tmp_path}/v.zip", {**SETTINGS, "snippets": 100})
    assert "frames that are needed decode" in check._inspect(shared("corrupted.mp4"))[1] and check._inspect(shared("v_GGSY1Qvo990.mp4"))[1] is None
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="audio_only.wav has no video stream"):
        media.open_media(shared("audio_only.wav"))


def test_without_ffmpeg_zips_load_and_a_video_says_what_to_install(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as z:
        z.writestr("video.json", json.dumps({"fps": 5, "num_frames": 1, "duration_sec": 0.2, "frames": [0]}))
        z.writestr("000000.jpg", jpeg(100))
    (tmp_path / "v.mp4").touch()
    script = f"""
import torch.ops
load = torch.ops.load_library
def without(path):
    if "libtorchcodec_core" in str(path):
        raise OSError("libavutil.so.58: cannot open shared object file")
    load(path)
torch.ops.load_library = without
import media
print(media.open_media({f"{tmp_path}/v.zip"!r}).read([0]).shape)
try:
    media.open_media({f"{tmp_path}/v.mp4"!r})
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.path.dirname(media.__file__))
    assert done.returncode == 0, done.stderr
    shape, error = done.stdout.splitlines()
    assert shape == "torch.Size([1, 3, 8, 12])" and error.startswith(f"{tmp_path}/v.mp4 is a video file") and error.endswith("apt-get install ffmpeg")


# ---------------------------------------------------------------- prepared ZIPs

@pytest.fixture
def folder(tmp_path):
    """A video as a folder of 40 frames, which needs no FFmpeg: frame i is uniformly 5 * i + 20."""
    path = tmp_path / "in/v"
    path.mkdir(parents=True)
    for i in range(40):
        (path / f"img_{i + 1:05d}.jpg").write_bytes(jpeg(5 * i + 20, 32, 48))
    (path / "video.json").write_text(json.dumps({"fps": 10, "duration_sec": 4.0}))
    return str(path)


def test_a_prepared_zip_has_the_frames_that_full_fidelity_needs_and_nothing_else(folder, tmp_path):
    assert media.prepare_video(folder, f"{tmp_path}/v.zip", SETTINGS) is None
    needed = [4, 6, 14, 16, 24, 26, 34, 36]  # centres 5, 15, 25, 35; two frames 2 apart around each
    assert media.snippet_frames(40, 4, 2, 2).flatten().tolist() == needed
    with zipfile.ZipFile(tmp_path / "v.zip") as z:  # an ordinary ZIP
        assert z.testzip() is None and all(i.compress_type == zipfile.ZIP_STORED for i in z.infolist())
        assert sorted(z.namelist()) == sorted(["video.json", *(f"{side}{n:06d}.jpg" for n in needed for side in ("", "24/", "16/"))])
        info = json.loads(z.read("video.json"))
    assert info["frames"] == needed and info["times_sec"] == [n / 10 for n in needed] and (info["fps"], info["num_frames"], info["duration_sec"]) == (10, 40, 4)
    video = media.open_media(f"{tmp_path}/v.zip")
    assert (video.num_frames, video.fps, video.duration, video.note, video.prepared) == (40, 10, 4.0, None, SETTINGS)
    assert (grey(video.read([36, 4, 4, 0, 39, 20, 15])) - torch.tensor([200, 40, 40, 40, 200, 140, 100])).abs().max() < 2  # the nearest; of two the later
    assert [video.read([4], side).shape[2:] for side in (None, 32, 25, 24.4, 24, 16, 9)] == [(32, 48)] * 3 + [(24, 36)] * 2 + [(16, 24)] * 2
    assert abs(grey(video.read([26], 16)) - 150) < 2
    read = video.read([4, 6])
    assert read.is_contiguous(memory_format=torch.channels_last)


def test_a_rate_asks_for_as_many_snippets_as_the_video_has_seconds(folder, tmp_path):
    media.prepare_video(folder, f"{tmp_path}/v.zip", {**SETTINGS, "rate": 0.5})  # 4 s: 2 snippets, centres 10 and 30
    assert media.open_media(f"{tmp_path}/v.zip").kept.tolist() == [9, 11, 29, 31]
    with pytest.raises(ValueError, match="rate 0.5 there, 1 now"):
        media.prepared_already(f"{tmp_path}/v.zip", {**SETTINGS, "rate": 1})


def test_the_same_zip_packed_again_reads_the_same(folder, tmp_path):
    media.prepare_video(folder, f"{tmp_path}/v.zip", SETTINGS)
    before = media.open_media(f"{tmp_path}/v.zip").read(range(40))
    with zipfile.ZipFile(tmp_path / "v.zip") as z, zipfile.ZipFile(tmp_path / "other.zip", "w", zipfile.ZIP_DEFLATED) as other, \
            zipfile.ZipFile(tmp_path / "first.zip", "w", zipfile.ZIP_STORED) as first:
        for name in sorted(z.namelist()):
            other.writestr(name, z.read(name))
        for name in ["video.json", *sorted(z.namelist())[:-1]]:  # video.json first, the others elsewhere than it says
            first.writestr(name, z.read(name))
    for name in ("other", "first"):
        assert torch.equal(media.open_media(f"{tmp_path}/{name}.zip").read(range(40)), before)


def test_torn_and_foreign_zips_are_named(folder, tmp_path):
    media.prepare_video(folder, f"{tmp_path}/v.zip", SETTINGS)
    content = (tmp_path / "v.zip").read_bytes()
    for size in (0, 20, 200, 3000, int(len(content) * 0.7)):
        (tmp_path / "torn.zip").write_bytes(content[:size])
        with pytest.raises(ValueError, match="torn.zip is no ZIP of frames .*prepare this video again"):
            media.open_media(f"{tmp_path}/torn.zip")
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as z:
        z.writestr("video.json", json.dumps({"fps": 5, "num_frames": 2, "duration_sec": 0.4, "frames": [0, 1]}))
        z.writestr("000000.jpg", jpeg(1, 8, 8)), z.writestr("000001.jpg", jpeg(1, 8, 16))
    with pytest.raises(ValueError, match=r"mixed.zip has frames that come out as \(8, 16\) pixels, expected \(8, 8\)"):
        media.open_media(f"{tmp_path}/mixed.zip").read([0, 1])
    for info in ({"fps": 5}, [], {"fps": 5, "num_frames": 2, "duration_sec": 1, "frames": []}):
        with zipfile.ZipFile(tmp_path / "odd.zip", "w") as z:
            z.writestr("video.json", json.dumps(info))
        with pytest.raises(ValueError, match="odd.zip is no ZIP of frames"):
            media.open_media(f"{tmp_path}/odd.zip")


def test_small_videos_keep_their_size_and_get_only_smaller_copies(folder, tmp_path):
    media.prepare_video(folder, f"{tmp_path}/v.zip", {**SETTINGS, "short_side": 100, "copies": [50, 32, 20]})
    video = media.open_media(f"{tmp_path}/v.zip")
    assert video.read([4]).shape[2:] == (32, 48) and video.read([4], 20).shape[2:] == (20, 30) and video.sides == [100, 20]


# ---------------------------------------------------------------- folders and images

def test_folders_of_frames_load(tmp_path):
    for name, value in (("img_00003.jpg", 30), ("img_00005.jpg", 50), ("img_00010.JPG", 100), ("flow_x_00001.jpg", 0), ("notes.txt", 0)):
        (tmp_path / name).write_bytes(jpeg(value))
    video = media.open_media(tmp_path)
    assert (video.num_frames, video.fps, video.duration) == (8, None, None)  # 3 ... 10
    assert (grey(video.read([0, 1, 2, 3, 5, 7])) - torch.tensor([30, 50, 50, 50, 100, 100])).abs().max() < 2
    Grey = JpegEncoder(torch.full((1, 8, 12), 77, dtype=torch.uint8)).to_tensor(quality=95).numpy().tobytes()
    (tmp_path / "img_00005.jpg").write_bytes(Grey)
    assert abs(grey(video.read([2])) - 77) < 2  # one channel becomes three
    (tmp_path / "img_00005.jpg").write_bytes(b"no JPEG")
    with pytest.raises(ValueError, match="frame img_00005.jpg cannot be read"):
        video.read([2])
    with pytest.raises(ValueError, match="tells no frame rate"):
        media.prepare_video(str(tmp_path), f"{tmp_path}/v.zip", SETTINGS)


def test_a_folder_without_frames_or_with_several_kinds_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no frame: expected files img_00001.jpg"):
        media.open_media(tmp_path)
    for name in ("left_1.jpg", "right_1.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    with pytest.raises(ValueError, match=r"several kinds, \['left_', 'right_'\]"):
        media.open_media(tmp_path)


@pytest.mark.parametrize("text", ['{"duration_sec": 2}', "[]", '{"fps": "10", "duration_sec": 2}', '{"fps": 0, "duration_sec": 2}', '{"fps": 10, "duration_sec": null}', "{"])
def test_a_bad_video_json_is_named(folder, text):
    with open(f"{folder}/video.json", "w") as f:
        f.write(text)
    with pytest.raises(ValueError, match="in/v/video.json is not as expected"):
        media.open_media(folder)
    assert "video.json is not as expected" in check._inspect(folder)[1]


def test_an_image_is_a_video_of_one_frame(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(90))
    still = media.open_media(f"{tmp_path}/a.jpg")
    assert still.num_frames == 1 and still.read([0, 5, 0]).shape == (3, 3, 8, 12)
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="a.jpg is no JPEG image"):
        still.read([0])


def test_media_are_found_by_name_with_and_without_v(tmp_path):
    for name in ("a.mp4", "v_b.mkv", "c.zip", "c.mp4", "notes.txt", ".hidden.mp4", "e.mp4.part", "x.zip.part-host-1", "v_f.WEBM", "f.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()
    found = media.find_media(tmp_path)
    assert {k: os.path.basename(v) for k, v in found.items()} == {"a": "a.mp4", "c": "c.zip", "d": "d", "f": "f.mp4", "v_b": "v_b.mkv", "v_f": "v_f.WEBM"}
    wanted = media.find_media(tmp_path, ["v_a", "b", "c", "g", "f", "v_f"])
    assert {k: os.path.basename(v) for k, v in wanted.items()} == {"v_a": "a.mp4", "b": "v_b.mkv", "c": "c.zip", "f": "f.mp4", "v_f": "v_f.WEBM"}
    assert media.find_media(tmp_path / "none", ["a"]) == {}
    said = []
    (tmp_path / "a.avi").touch()
    assert os.path.basename(media.find_media(tmp_path, ["v_a", "c"], say=said.append)["v_a"]) == "a.mp4" and said == [f"{tmp_path}/a.mp4 is taken, not {tmp_path}/a.avi"]
    assert os.path.basename(media.find_media(tmp_path, prepared=False)["c"]) == "c.mp4" and "d" not in media.find_media(tmp_path, skip=tmp_path / "d/out")


def test_finding_media_among_20000_files_takes_one_scan(tmp_path):
    for i in range(20000):
        os.mknod(f"{tmp_path}/v_{i:011d}.zip")
    started = time.process_time()
    assert len(media.find_media(tmp_path, [f"{i:011d}" for i in range(20000)])) == 20000
    assert time.process_time() - started < 2


# ---------------------------------------------------------------- preparing many

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


def test_one_broken_video_does_not_stop_the_others_and_a_second_run_goes_on(videos, tmp_path):
    out, said = f"{tmp_path}/out", []
    made, failed = media.prepare(videos, out, SETTINGS, 0, said.append)
    assert made == ["a", "c", "d"] and list(failed) == ["b"] and "img_1.jpg cannot be read" in failed["b"] and said == [f"FAILED b: {failed['b']}"]
    assert sorted(os.listdir(out)) == ["a.zip", "c.zip", "d.zip"]
    stamps = {f: os.stat(f"{out}/{f}").st_mtime_ns for f in os.listdir(out)}
    os.remove(f"{out}/c.zip")
    assert media.prepare(videos, out, SETTINGS, 0, said.append)[0] == ["c"]
    assert all(os.stat(f"{out}/{f}").st_mtime_ns == stamps[f] for f in ("a.zip", "d.zip"))


def test_nothing_is_written_over(videos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.zip").write_text("the user's")
    (out / "c.zip").symlink_to("/nowhere")
    media.prepare({"d": videos["d"]}, str(out), SETTINGS, 0)
    made, failed = media.prepare(videos, str(out), {**SETTINGS, "stride": 3}, 0, lambda words: None)
    assert made == [] and sorted(failed) == ["a", "b", "c", "d"]
    assert (out / "a.zip").read_text() == "the user's" and os.path.islink(out / "c.zip")
    assert "d.zip is there already, prepared otherwise (stride 2 there, 3 now): name another --out" in failed["d"]
    assert media.open_media(f"{out}/d.zip").prepared == SETTINGS


def test_what_killed_processes_were_writing_is_removed(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = media.socket.gethostname()
    parts = {name: tmp_path / f"v.zip.part-{name}" for name in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", f"elsewhere-{dead.pid}")}
    for part in parts.values():
        part.touch()
    media.remove_stale_parts(tmp_path)
    assert [part.exists() for part in parts.values()] == [False, True, True]  # of other machines nothing is known


def test_kill_9_while_preparing_leaves_nothing_that_passes_for_whole(videos, tmp_path):
    command = [sys.executable, data.__file__, "prepare", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "0", "--snippets", "40",
               "--frames", "2", "--stride", "1", "--short-side", "32", "--copies"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (os.path.isdir(tmp_path / "out") and os.listdir(tmp_path / "out")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = os.listdir(tmp_path / "out")
    assert left and all(len(media.open_media(f"{tmp_path}/out/{f}").kept) == 40 for f in left if f.endswith(".zip"))
    settings = {"snippets": 40, "frames": 2, "stride": 1, "short_side": 32, "copies": [], "quality": 90}
    made, failed = media.prepare(videos, f"{tmp_path}/out", settings, 0, lambda words: None)
    assert list(failed) == ["b"] and sorted(made + [f[:-4] for f in left if f.endswith(".zip")]) == ["a", "c", "d"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a.zip", "c.zip", "d.zip"]


def test_sigterm_while_preparing_ends_the_workers(videos, tmp_path):
    process = subprocess.Popen([sys.executable, data.__file__, "prepare", "--videos", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    children, deadline = [], time.monotonic() + 60
    while len(children) < 3 and process.poll() is None and time.monotonic() < deadline:  # two workers and multiprocessing's resource tracker
        time.sleep(0.01)
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
            children = list(map(int, f.read().split()))
    process.terminate()
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == 130 and len(children) == 3


    def running(pid):  # neither gone nor a zombie that this machine's init has not collected
        try:
            with open(f"/proc/{pid}/stat") as f:
                return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False
    while any(map(running, children)) and time.monotonic() < deadline:  # the tracker ends a moment later
        time.sleep(0.05)
    assert not any(map(running, children))


def test_a_process_that_dies_costs_its_own_video_only(monkeypatch):
    monkeypatch.setattr(media, "_start_worker", str)  # what a worker starts with; the real one takes seconds to import torch
    jobs = {"a": "1 + 1", "b": "__import__('os')._exit(3)", "c": "int('x')", "d": "2 + 2"}
    results = {name: (result, type(error), str(error)) for name, result, error in media.run_jobs(eval, jobs, 2, "test")}
    assert results["a"][0] == 2 and results["d"][0] == 4 and results["c"][1] is ValueError
    assert results["b"][0] is None and "process died" in results["b"][2]
