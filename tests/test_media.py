import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchcodec.decoders import VideoDecoder
from torchcodec.encoders import JpegEncoder

import media
from media import InputError
from tools.prepare_data import write_frame_zip

SHARED = Path(__file__).parent.parent.parent / "shared/data/videos"
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")


def shared(name):
    if not (SHARED / name).exists():
        pytest.skip(f"no {name} here")
    return str(SHARED / name)


def flat(values, height=32, width=48):
    """Return frames of which the i-th is uniformly values[i]."""
    values = torch.as_tensor(values, dtype=torch.uint8)
    return values[:, None, None, None].expand(-1, 3, height, width).contiguous()


def encode(path, frames, *options, fps=10):
    """Write a video file of frames (F, 3, H, W)."""
    height, width = frames.shape[2:]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)]
    codec = ["-c:v", "mpeg4", "-q:v", "2", "-threads", "1"]
    command = ["ffmpeg", "-v", "error", "-y", *source, "-i", "-", *codec, *options, str(path)]
    raw = frames.permute(0, 2, 3, 1).contiguous().numpy().tobytes()
    subprocess.run(command, input=raw, check=True)
    return str(path)


def grey(frames):
    return frames.float().mean((1, 2, 3))


def noisy(count, height=48, width=64):
    """Return frames that do not compress: their file is cut where its bytes are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def jpeg(value, height=8, width=12, quality=95):
    frame = flat([value], height, width)[0]
    return JpegEncoder(frame).to_tensor(quality=quality).numpy().tobytes()


# ------------------------------------------------------------------------------------ video files


@needs_ffmpeg
def test_numbers_are_presentation_order_at_a_constant_rate(tmp_path):
    values = torch.arange(40) * 5 + 20
    # With B-frames, which are not in the order of the file.
    video = media.open_media(encode(tmp_path / "v.mp4", flat(values), "-bf", "2", "-g", "12"))
    assert (video.num_frames, round(video.fps, 6), round(video.duration, 6)) == (40, 10, 4)
    assert video.note is None
    numbers = [39, 0, 7, 7, 31, 12]
    assert (grey(video.read(numbers)) - values[numbers]).abs().max() < 2.5
    sizes = {None: (32, 48), 16: (16, 24), 15.2: (16, 24), 99: (32, 48)}
    assert {side: video.read([3], side).shape[2:] for side in sizes} == sizes
    middle = video.read([3, 5], view=lambda x: x[4:12, 6:10])
    assert middle.shape == (2, 3, 8, 4)
    assert (grey(middle) - values[[3, 5]]).abs().max() < 2.5


@needs_ffmpeg
def test_at_a_variable_rate_numbers_are_even_in_time(tmp_path):
    # 20 frames 0.1 s apart, then 10 frames 0.4 s apart: 6 s, 5 frames a second.
    values = torch.arange(30) * 7 + 20
    times = "settb=1/1000,setpts=if(lt(N\\,20)\\,N*0.1\\,1.97+(N-20)*0.4)/TB"
    scale = ["-enc_time_base", "1/1000", "-video_track_timescale", "1000"]
    path = encode(tmp_path / "v.mp4", flat(values), "-vf", times, "-fps_mode", "vfr", *scale)
    video = media.open_media(path)
    assert video.num_frames == 30 and 5.6 < video.duration < 6.1
    assert video.fps == pytest.approx(30 / video.duration)
    times = np.concatenate([np.arange(20) * 0.1, 1.97 + np.arange(10) * 0.4])
    np.testing.assert_allclose(video.times, times, atol=2e-3)
    seconds = (np.arange(30) + 0.5) / video.fps
    shown = np.searchsorted(times, seconds, side="right") - 1
    # Not at the very change from one frame to the next.
    clear = np.abs(seconds[:, None] - times).min(1) > 0.01
    assert clear.sum() > 20
    assert (grey(video.read(range(30))) - values[shown]).abs()[clear].max() < 3


@needs_ffmpeg
@pytest.mark.parametrize("kind, options", [("mp4", ["-movflags", "+faststart"]), ("avi", [])])
def test_a_truncated_file_is_used_from_90_percent_on(tmp_path, kind, options):
    # Its header, which comes first, tells 5 s.
    whole = Path(encode(tmp_path / f"whole.{kind}", noisy(50), "-g", "5", *options)).read_bytes()
    (tmp_path / f"most.{kind}").write_bytes(whole[: int(len(whole) * 0.95)])
    (tmp_path / f"half.{kind}").write_bytes(whole[: int(len(whole) * 0.5)])
    video = media.open_media(f"{tmp_path}/most.{kind}")
    assert (video.num_frames, video.duration) == (50, 5)
    assert "of the 5.00 s that its header tells" in video.note
    # Annotations count on 5 s: the last frame stays.
    last = max(dict(video.decode(range(50))))
    assert 44 <= last < 49
    frames = video.read(range(50))
    assert torch.equal(frames[49], frames[last])
    with pytest.raises(InputError, match=rf"half.{kind} is truncated: .* 2\.\d+ of the 5.00 s"):
        media.open_media(f"{tmp_path}/half.{kind}")


@needs_ffmpeg
def test_what_builds_on_a_damaged_frame_is_left_out_up_to_the_next_key_frame(tmp_path):
    x264 = "keyint=10:min-keyint=10:scenecut=0:bframes=0"
    options = ["-c:v", "libx264", "-x264-params", x264, "-pix_fmt", "yuv420p", "-qp", "20"]
    path = encode(tmp_path / "v.mp4", noisy(60), *options)
    clean = media.open_media(path).read(range(60))
    content = Path(path).read_bytes()
    start = content.index(b"mdat")
    start += int((len(content) - start) * 0.4)

    def damage(size):
        (tmp_path / "bad.mp4").write_bytes(content[:start] + bytes(size) + content[start + size :])
        video = media.open_media(f"{tmp_path}/bad.mp4")
        decoded = dict(video.decode(range(60)))
        lost = sorted(set(range(60)) - set(decoded))
        assert 22 <= lost[0] <= 26
        # Of the frame before FFmpeg repairs a part.
        intact = [i for i in decoded if i != lost[0] - 1]
        assert all(torch.equal(decoded[i], clean[i]) for i in intact)
        return video, decoded, lost

    # About two frames: the nearest one stands in for what is lost.
    video, decoded, lost = damage(6000)
    assert lost == list(range(lost[0], 30)) and len(lost) <= 6
    repeated = decoded[lost[0] - 1].expand(3, -1, -1, -1)
    assert torch.equal(video.read(range(60))[lost[0] : lost[0] + 3], repeated)
    # About eight frames.
    video, _, lost = damage(25000)
    assert lost == list(range(lost[0], 40))
    with pytest.raises(InputError, match=f"bad.mp4 is damaged: only {60 - len(lost)} of the 60"):
        video.read(range(60))


@needs_ffmpeg
def test_what_is_not_a_video_is_refused_in_one_line(tmp_path):
    with wave.open(f"{tmp_path}/sound.wav", "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    (tmp_path / "text.mp4").write_text("no video " * 100)
    (tmp_path / "empty.mp4").touch()
    reasons = {
        "sound.wav": r"is not a valid video \(No valid video stream",
        "text.mp4": "is not a valid video .*: copy it anew, or try ",
        "empty.mp4": "is not a valid video",
        "none.mp4": "",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=f"{name} ?{reason}") as error:
            media.open_media(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value) and ".cpp" not in str(error.value)


@needs_ffmpeg
@pytest.mark.parametrize(
    "name, frames, duration, height, width",
    [
        ("v_GGSY1Qvo990.mp4", 355, 18.094, 240, 320),
        ("flipping_a_pancake.mkv", 310, 10.333, 240, 426),
        ("video_90.mov", 3, 0.1, 568, 320),
        ("h264_10bits.mp4", 30, 1.0, 200, 200),
        ("exercise.avi", 393, 39.3, 288, 384),
    ],
)
def test_real_videos(name, frames, duration, height, width):
    video = media.open_media(shared(name))
    assert (video.num_frames, video.height, video.width) == (frames, height, width)
    assert video.note is None and video.duration == pytest.approx(duration, abs=2e-3)
    numbers = [frames - 1, 0, frames // 2]
    decoder = VideoDecoder(shared(name))
    assert torch.equal(video.read(numbers), torch.stack([decoder[i] for i in numbers]))
    small = video.read(numbers, 100)
    assert min(small.shape[2:]) == 100
    assert (grey(small) - grey(video.read(numbers))).abs().max() < 1


@needs_ffmpeg
def test_a_real_file_without_pictures_is_refused():
    with pytest.raises(InputError, match=r"audio_only.wav is not a valid video \(No valid video"):
        media.open_media(shared("audio_only.wav"))


def test_without_ffmpeg_zips_load_and_a_video_says_what_to_install(tmp_path):
    info = {"fps": 5, "num_frames": 1, "duration_sec": 0.2, "frames": [0]}
    write_frame_zip(tmp_path / "v.zip", info, [{0: jpeg(100)}])
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
except media.InputError as error:
    print(error)
"""
    command = [sys.executable, "-c", script]
    clone = os.path.dirname(media.__file__)
    done = subprocess.run(command, capture_output=True, text=True, cwd=clone)
    assert done.returncode == 0, done.stderr
    shape, error = done.stdout.splitlines()
    assert shape == "torch.Size([1, 3, 8, 12])"
    assert error.startswith(f"{tmp_path}/v.mp4") and "need FFmpeg" in error


# ------------------------------------------------------------------------------------ frame ZIPs


@pytest.fixture
def frame_zip(tmp_path):
    """A ZIP with frames 3, 7, 8 and 1000000 of a video and copies of them, each half as large."""
    numbers = [3, 7, 8, 1_000_000]
    jpegs = [
        {number: jpeg(20 + 50 * i, 32 // 2**k, 48 // 2**k) for i, number in enumerate(numbers)}
        for k in range(3)
    ]
    info = {
        "fps": 10,
        "num_frames": 1_000_001,
        "duration_sec": 100_000.1,
        "frames": numbers,
        "note": "a note",
        "prepared": {"stride": 2},
        "short_sides": [32, 16, 8],
        "bytes": [[len(x) for x in frames.values()] for frames in jpegs],
    }
    write_frame_zip(tmp_path / "v.zip", info, jpegs)
    return f"{tmp_path}/v.zip"


def test_a_prepared_zip_has_frames_by_number(frame_zip):
    video = media.open_media(frame_zip)
    assert (video.num_frames, video.fps, video.duration) == (1_000_001, 10, 100_000.1)
    assert (video.note, video.prepared) == ("a note", {"stride": 2})
    # The nearest one, of two the later.
    frames = video.read([1_000_000, 3, 3, 0, 5, 7, 9])
    assert frames.shape == (7, 3, 32, 48)
    assert frames.is_contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([170, 20, 20, 20, 70, 70, 120])
    assert (grey(frames) - expected).abs().max() < 2
    assert [number for number, _ in video.decode([8, 3, 8])] == [3, 8]
    cropped = video.read([7, 3], view=lambda x: x[1:3, :5])
    assert cropped.shape == (2, 3, 2, 5)
    # Of numbers and places all are read without the ZIP's own directory.
    assert "archive" not in vars(video)


def test_memory_of_frames_is_taken_again_only_when_nobody_holds_them(frame_zip):
    video = media.open_media(frame_zip)
    held = [video.read([number] * 8) for number in (3, 7, 8, 3)]
    assert len({frames.data_ptr() for frames in held}) == 4
    # What is made of them holds their memory, too.
    part, array = held[2][5:, :1].permute(1, 0, 2, 3), held[3].numpy()[2:]
    held = held[:2]
    others = [video.read([1_000_000] * 8) for _ in range(3)]
    values = [frames.float().mean().item() for frames in (*held, part, torch.from_numpy(array))]
    assert values == pytest.approx([20, 70, 120, 20], abs=2)
    del part, array, others
    again = [video.read([7] * 4) for _ in range(2)]
    assert again[0].shape == (4, 3, 32, 48) and abs(grey(again[0]) - 70).max() < 2
    del again
    memories = [id(memory) for memory, _ in media._spare]
    assert all(abs(grey(video.read([8] * 4)) - 120).max() < 2 for _ in range(3))
    assert sorted(id(memory) for memory, _ in media._spare) == sorted(memories)


def test_the_smallest_copy_that_is_large_enough_is_read(frame_zip):
    video = media.open_media(frame_zip)
    heights = {None: 32, 40: 32, 17: 32, 16.4: 16, 16: 16, 9: 16, 8: 8, 2: 8}
    assert {side: video.read([7], side).shape[2] for side in heights} == heights
    assert abs(grey(video.read([8], 8)) - 120) < 2
    assert "archive" not in vars(video)


def test_the_same_zip_packed_again_reads_the_same(frame_zip, tmp_path):
    before = media.open_media(frame_zip).read(range(10))
    with zipfile.ZipFile(frame_zip) as archive:
        files = {name: archive.read(name) for name in sorted(archive.namelist())}
    with zipfile.ZipFile(tmp_path / "deflated.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    # video.json comes first, the others elsewhere than it says.
    with zipfile.ZipFile(tmp_path / "moved.zip", "w") as packed:
        for name in ["video.json", *list(files)[:-1]]:
            packed.writestr(name, files[name])
    for name in ("deflated", "moved"):
        assert torch.equal(media.open_media(f"{tmp_path}/{name}.zip").read(range(10)), before)


def test_truncated_zips_are_named(frame_zip, tmp_path):
    content = Path(frame_zip).read_bytes()
    for size in (0, 20, 200, 1500, int(len(content) * 0.7)):
        (tmp_path / "torn.zip").write_bytes(content[:size])
        with pytest.raises(InputError, match=r"torn.zip is not a valid ZIP .*prepare this video"):
            media.open_media(f"{tmp_path}/torn.zip")
    assert size > 1500
    with pytest.raises(InputError, match=rf"truncated: {size} of at least \d+ bytes"):
        media.open_media(f"{tmp_path}/torn.zip")


def test_a_damaged_frame_is_named(frame_zip, tmp_path):
    content = bytearray(Path(frame_zip).read_bytes())
    start = content.index(b"\xff\xd8", content.index(b"000007.jpg"))
    content[start : start + 400] = bytes(400)
    (tmp_path / "bad.zip").write_bytes(content)
    video = media.open_media(f"{tmp_path}/bad.zip")
    assert video.read([3, 8]).shape[0] == 2
    with pytest.raises(InputError, match=r"bad.zip: 000007.jpg is not a valid JPEG"):
        video.read([7])


@pytest.mark.parametrize(
    "info",
    [
        [],
        {"fps": 5},
        {"fps": 5, "num_frames": 2, "duration_sec": 1, "frames": []},
        {"fps": 5, "num_frames": 2, "duration_sec": 1, "frames": [0, 0]},
        {"fps": 5, "num_frames": 2, "duration_sec": 1, "frames": [1, 0]},
        {"fps": "5", "num_frames": 2, "duration_sec": 1, "frames": [0]},
    ],
)
def test_a_bad_video_json_in_a_zip_is_named(tmp_path, info):
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        archive.writestr("video.json", json.dumps(info))
    with pytest.raises(InputError, match=r"odd.zip is not a valid ZIP of frames"):
        media.open_media(f"{tmp_path}/odd.zip")


@pytest.mark.parametrize("frames", [[0.5, 1.5], ["0", "1"], [1, 0], [0, 0]])
def test_frame_numbers_that_are_none_are_told(tmp_path, frames):
    info = {"fps": 5, "num_frames": 2, "duration_sec": 0.4, "frames": frames}
    write_frame_zip(tmp_path / "v.zip", info, [])
    with pytest.raises(InputError, match="expected frame numbers in ascending order"):
        media.open_media(f"{tmp_path}/v.zip")


def test_frames_of_different_sizes_are_refused(tmp_path):
    info = {"fps": 5, "num_frames": 2, "duration_sec": 0.4, "frames": [0, 1]}
    write_frame_zip(tmp_path / "v.zip", info, [{0: jpeg(1, 8, 8), 1: jpeg(1, 8, 16)}])
    with pytest.raises(InputError, match=r"sizes \(8, 16, 3\) and \(8, 8, 3\)"):
        media.open_media(f"{tmp_path}/v.zip").read([0, 1])


def test_an_image_that_declares_too_many_pixels_is_refused_before_decoding(tmp_path):
    content = jpeg(90)
    at = content.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(content[:at] + b"\xea\x60" * 2 + content[at + 4 :])
    with pytest.raises(InputError, match=r"a.jpg is not a valid JPEG image \(more than .* pixels"):
        media.open_media(f"{tmp_path}/a.jpg").read([0])


# ------------------------------------------------------------------------------ folders and images


def test_folders_of_frames_load(tmp_path):
    values = {"img_00003.jpg": 30, "img_00005.jpg": 50, "img_00010.JPG": 100, "flow_x_00001.jpg": 0}
    for name, value in {**values, "notes.txt": 0}.items():
        (tmp_path / name).write_bytes(jpeg(value))
    video = media.open_media(tmp_path)
    # Files 3 to 10.
    assert (video.num_frames, video.fps, video.duration) == (8, None, None)
    expected = torch.tensor([30, 50, 50, 50, 100, 100])
    assert (grey(video.read([0, 1, 2, 3, 5, 7])) - expected).abs().max() < 2
    # One channel becomes three.
    one_channel = torch.full((1, 8, 12), 77, dtype=torch.uint8)
    JpegEncoder(one_channel).to_file(f"{tmp_path}/img_00005.jpg", quality=95)
    assert abs(grey(video.read([2])) - 77) < 2
    (tmp_path / "img_00005.jpg").write_bytes(b"no JPEG")
    with pytest.raises(InputError, match=r"img_00005.jpg is not a valid JPEG"):
        video.read([2])


def test_a_folder_without_frames_or_with_several_kinds_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no frames: expected files img_00001.jpg"):
        media.open_media(tmp_path)
    for name in ("left_1.jpg", "right_1.jpg"):
        (tmp_path / name).write_bytes(jpeg(0))
    with pytest.raises(InputError, match=r"several kinds, \['left_', 'right_'\]"):
        media.open_media(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"duration_sec": 2}',
        "[]",
        '{"fps": "10", "duration_sec": 2}',
        '{"fps": 0, "duration_sec": 2}',
        '{"fps": 10, "duration_sec": null}',
        "{",
    ],
)
def test_a_bad_video_json_in_a_folder_is_named(tmp_path, text):
    (tmp_path / "img_1.jpg").write_bytes(jpeg(0))
    (tmp_path / "video.json").write_text(text)
    with pytest.raises(InputError, match=r"video.json: expected .*fps"):
        media.open_media(tmp_path)


def test_an_image_is_a_video_of_one_frame(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(90))
    still = media.open_media(f"{tmp_path}/a.jpg")
    assert still.num_frames == 1 and still.read([0, 5, 0]).shape == (3, 3, 8, 12)
    (tmp_path / "a.jpg").write_bytes(jpeg(90) + bytes(media.MAX_BYTES))
    with pytest.raises(InputError, match=rf"more than {media.MAX_BYTES} bytes"):
        still.read([0])
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"a.jpg is not a valid JPEG image"):
        still.read([0])


# --------------------------------------------------------------------------------- finding videos


def find(folder, *args, **options):
    found = media.find_media(folder, *args, **options)
    return {name: os.path.basename(path) for name, path in found.items()}


def test_media_are_found_by_name_with_and_without_v(tmp_path):
    files = "a.mp4 v_b.mkv c.zip c.mp4 notes.txt .hidden.mp4 e.mp4.part x.zip.part-host-1 v_f.WEBM"
    for name in [*files.split(), "f.mp4"]:
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()
    everything = {"a": "a.mp4", "c": "c.zip", "d": "d", "f": "f.mp4", "v_b": "v_b.mkv"}
    everything["v_f"] = "v_f.WEBM"
    assert find(tmp_path) == everything
    wanted = {"v_a": "a.mp4", "b": "v_b.mkv", "c": "c.zip", "f": "f.mp4", "v_f": "v_f.WEBM"}
    assert find(tmp_path, [*wanted, "g"]) == wanted
    assert find(tmp_path / "none", ["a"]) == {}
    assert find(tmp_path, prepared=False)["c"] == "c.mp4"
    assert "d" not in find(tmp_path, skip=tmp_path / "d/out")


def test_names_with_control_characters_do_not_reach_the_terminal(tmp_path):
    path = tmp_path / "a\x1b[31m.mp4"
    path.touch()
    (tmp_path / "b.mp4").touch()
    assert list(media.find_media(tmp_path)) == [r"a\x1b[31m", "b"]
    for name in (path, b"bad\xff.mp4".decode(errors="surrogateescape")):
        with pytest.raises(InputError, match=r"^'.*(x1b\[31m|udcff)\.mp4' has .*: rename it$"):
            media.open_media(name)


@pytest.mark.parametrize(("file", "name"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_an_umlaut_is_the_same_as_one_character_and_as_two(tmp_path, file, name):
    path = tmp_path / f"{unicodedata.normalize(file, 'Übung 4')}.mkv"
    path.touch()
    name = unicodedata.normalize(name, "Übung 4")
    assert media.find_media(tmp_path, [name]) == {name: str(path)}
    assert media.find_media(tmp_path, [f"v_{name}"]) == {f"v_{name}": str(path)}


def test_of_two_video_files_the_one_that_is_used_is_told(tmp_path):
    for name in ("a.mp4", "a.avi", "c.zip", "c.mp4"):
        (tmp_path / name).touch()
    told = []
    assert find(tmp_path, ["v_a", "c"], log=told.append)["v_a"] == "a.mp4"
    assert told == [f"{tmp_path}/a.mp4 is used, not {tmp_path}/a.avi"]


def test_finding_media_among_20000_files_takes_one_scan(tmp_path):
    for i in range(20000):
        os.mknod(f"{tmp_path}/v_{i:011d}.zip")
    started = time.process_time()
    assert len(media.find_media(tmp_path, [f"{i:011d}" for i in range(20000)])) == 20000
    assert time.process_time() - started < 2


# ---------------------------------------------------------------------- containers, codecs, offsets

# Of each container the codec of its sound and those of its pictures that FFmpeg writes.
CONTAINERS = {
    "mp4": ("aac", "h264 mpeg4 mpeg2 vp9"),
    "mov": ("aac", "h264 mpeg4 mpeg2"),
    "mkv": ("aac", "h264 mpeg4 mpeg2 vp9"),
    "webm": ("libvorbis", "vp9"),
    "avi": ("mp2", "h264 mpeg4 mpeg2 vp9"),
    "ts": ("mp2", "h264 mpeg4 mpeg2"),
    "m2ts": ("mp2", "h264 mpeg4 mpeg2"),
    "mpg": ("mp2", "h264 mpeg4 mpeg2"),
    "vob": ("mp2", "h264 mpeg4 mpeg2"),
    "flv": ("aac", "h264"),
    "wmv": ("wmav2", "h264 mpeg4 mpeg2 vp9 wmv2"),
    "ogv": ("libvorbis", "theora"),
    "3gp": ("aac", "h264 mpeg4"),
    "mxf": ("pcm_s16le -ar 48000", "h264 mpeg2"),
    "gif": (None, "gif"),
}
CODECS = {
    "h264": "libx264 -preset ultrafast -pix_fmt yuv420p -q:v 2 -g 12",
    "mpeg4": "mpeg4 -pix_fmt yuv420p -q:v 2 -g 12",
    "mpeg2": "mpeg2video -pix_fmt yuv420p -q:v 2 -g 12",
    "vp9": "libvpx-vp9 -pix_fmt yuv420p -deadline realtime -cpu-used 8 -g 12 -b:v 1M",
    "theora": "libtheora -pix_fmt yuv420p -q:v 9",
    "wmv2": "wmv2 -pix_fmt yuv420p -q:v 2 -g 12",
    "flv": "flv -pix_fmt yuv420p -q:v 2 -g 12",
    "gif": "gif",
}
SOUND_SEC = (0, 1, 5)  # none, shorter than the pictures, longer
OFFSETS_SEC = (0, 0.3, 3)
STEP = 4  # of the gray levels of frames, one after the other


def all_videos():
    """Return (container, codec, B-frames, seconds of sound, offset) of every video to try."""
    videos = []
    for suffix, (_, codecs) in CONTAINERS.items():
        for codec in codecs.split():
            counts = (0, 2) if codec in ("h264", "mpeg4", "mpeg2") else (0,)
            sounds = {"mxf": (0, 5), "gif": (0,)}.get(suffix, SOUND_SEC)  # mxf ends with the sound
            videos += itertools.product([suffix], [codec], counts, sounds, OFFSETS_SEC)
    return videos


def some_videos():
    """Return videos that show each container with each codec, sound and offset."""
    videos, every = [], all_videos()
    for i, suffix in enumerate(CONTAINERS):
        own = [video for video in every if video[0] == suffix]
        choices = [sorted(set(values)) for values in zip(*own, strict=True)]
        for k in range(max(map(len, choices))):
            turns = (0, k, k + i, k, k + i)
            videos.append(tuple(x[n % len(x)] for x, n in zip(choices, turns, strict=True)))
    return videos


def write_video(path, codec, b_frames, sound, sound_sec, offset):
    """Write 50 frames of 25 a second, each gray by its number, from `offset` on, under a sound."""
    levels = np.arange(50, dtype=np.uint8) * STEP + 20
    frames = np.broadcast_to(levels[:, None], (50, 64 * 96)).tobytes()
    ffmpeg = ["ffmpeg", "-v", "error", "-y"]
    raw = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", "96x64", "-r", "25", "-i", "-"]
    options = [*CODECS[codec].split(), *(["-bf", str(b_frames)] if b_frames else [])]
    moved = sound_sec or offset
    plain = f"{os.path.dirname(path)}/plain{os.path.splitext(path)[1]}" if moved else path
    subprocess.run([*ffmpeg, *raw, "-c:v", *options, plain], input=frames, check=True)
    if moved:
        tone = f"-f lavfi -i sine=duration={sound_sec + offset} -map 0:v -map 1:a -ar 44100"
        tone = [*tone.split(), "-c:a", *sound.split()] if sound_sec else []
        shifted = [*ffmpeg, "-itsoffset", str(offset), "-i", plain, *tone]
        subprocess.run([*shifted, "-c:v", "copy", path], check=True)


def frame_numbers(frames):
    """Return which frame of write_video each frame is."""
    gray = frames.float().mean((1, 2, 3))
    return ((gray - 20) / STEP).round().long().numpy()


def probed_times(path):
    """Return when each frame is shown, as ffprobe tells, and where the file's clock begins."""
    entries = "frame=best_effort_timestamp_time:format=start_time"
    command = ["ffprobe", "-v", "error", "-select_streams", "v:0", "-show_entries", entries]
    done = subprocess.run([*command, "-of", "json", path], capture_output=True, check=True)
    found = json.loads(done.stdout)
    times = [float(f.get("best_effort_timestamp_time", "nan")) for f in found["frames"]]
    return np.array(times), float(found["format"].get("start_time", 0))


@needs_ffmpeg
@pytest.mark.parametrize(
    "suffix, codec, b_frames, sound_sec, offset",
    all_videos() if "ALL_VIDEOS" in os.environ else some_videos(),  # 630, or 49 of them
)
def test_every_container_gives_its_frames_at_their_times(
    suffix, codec, b_frames, sound_sec, offset, tmp_path
):
    path = f"{tmp_path}/v.{suffix}"
    write_video(path, codec, b_frames, CONTAINERS[suffix][0], sound_sec, offset)
    video = media.open_media(path)
    begins_anywhere = f".{suffix}" in media.MPEG_STREAMS
    if suffix in ("gif", "mxf") or (begins_anywhere and not sound_sec):
        offset = 0  # no file of that kind can tell it
    assert video.note is None and abs(video.duration - offset - 2) < 0.13
    numbers = np.arange(video.num_frames)
    seconds = (numbers + 0.5) / video.fps
    found = frame_numbers(video.read(numbers))
    written = np.floor((seconds - offset) * 25).clip(0, 49)
    assert abs(found - written).max() <= 2, (found, written)
    times, start = probed_times(path)
    assert abs(len(times) - 50) <= 1
    # In these two, stamps of packets are not those of frames.
    if suffix not in ("avi", "mxf") and not np.isnan(times).any():
        times -= start if begins_anywhere else 0
        times -= times[0] if times[0] < 0.1 else 0
        shown = np.searchsorted(times, seconds + 1e-6, side="right") - 1
        assert abs(found - shown.clip(0)).max() <= 1, (found, shown)


@needs_ffmpeg
def test_a_codec_without_a_decoder_is_named(tmp_path):
    path = Path(encode(tmp_path / "v.mkv", flat([9] * 5)))
    content = path.read_bytes()
    assert content.count(b"V_MPEG4/ISO/ASP") == 1
    path.write_bytes(content.replace(b"V_MPEG4/ISO/ASP", b"V_MPEGI/ISO/VVC"))
    with pytest.raises(InputError, match=r"v\.mkv cannot be decoded \(.*no decoder for it\)"):
        media.open_media(f"{path}").read([0])


@needs_ffmpeg
def test_a_video_that_cannot_be_sought_in_says_how_to_remux_it(tmp_path):
    write_video(f"{tmp_path}/v.flv", "flv", 0, "aac", 1, 0.3)
    with pytest.raises(
        InputError, match=r"v.flv is not a valid video .*support seeking"
    ) as refused:
        media.open_media(f"{tmp_path}/v.flv")
    command = str(refused.value).partition("or try ")[2]
    subprocess.run([*command.split(), "-v", "error"], check=True)
    assert media.open_media(f"{tmp_path}/v-remuxed.mkv").duration == pytest.approx(2.3, abs=0.1)


def test_what_a_zip_claims_is_bounded_before_it_is_read(tmp_path):
    info = {"fps": 5, "num_frames": 2, "duration_sec": 0.4, "frames": [0, 1]}
    wrong = [{"fps": 1e308}, {"num_frames": 10**18}, {"duration_sec": 1e308}, {"frames": [-1, 0]}]
    wrong += [{"frames": [0.5, 1.5]}, {"frames": [0, 5]}, {"num_frames": 1}]
    wrong += [{"bytes": [[-1, 2]], "short_sides": [8]}, {"bytes": [[9, 9]], "short_sides": [None]}]
    wrong += [{"bytes": [[9, 9]], "short_sides": []}, {"bytes": "x", "short_sides": [8]}]
    for change in wrong:
        with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
            archive.writestr("video.json", json.dumps(info | change))
        with pytest.raises(InputError, match="not a valid ZIP of frames"):
            media.open_media(f"{tmp_path}/v.zip")
    huge = bytearray(jpeg(100, 8, 8))
    at = huge.index(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\x4e\x20\x4e\x20"  # 20,000 x 20,000 pixels
    for content in (bytes(huge), jpeg(9, 8, 8) + bytes(2**25)):
        with zipfile.ZipFile(tmp_path / "v.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("video.json", json.dumps(info))
            archive.writestr("000000.jpg", content)
        with pytest.raises(InputError, match=r"000000\.jpg is not a valid JPEG"):
            media.open_media(f"{tmp_path}/v.zip").read([0])
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.writestr("video.json", json.dumps(info | {"prepared": 3}))
    assert media.open_media(f"{tmp_path}/v.zip").prepared is None


@pytest.mark.parametrize("duration", [10**400, 1e300])
def test_numbers_beyond_all_sense_are_refused(tmp_path, duration):
    (tmp_path / "img_00001.jpg").write_bytes(jpeg(30))
    (tmp_path / "video.json").write_text(json.dumps({"fps": 5, "duration_sec": duration}))
    with pytest.raises(InputError, match="numbers above 0"):
        media.open_media(tmp_path)


def test_a_note_in_a_zip_is_text(frame_zip, tmp_path):
    with zipfile.ZipFile(frame_zip) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    info = json.loads(entries["video.json"]) | {"note": [1, {"a": 2}]}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, content in (entries | {"video.json": json.dumps(info)}).items():
            archive.writestr(name, content)
    assert media.open_media(f"{tmp_path}/x.zip").note == "[1, {'a': 2}]"
