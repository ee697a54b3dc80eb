"""Video files to tensors: decoding with PyAV, and sample clips found on this machine."""

from __future__ import annotations

from sora_models.data.clips import SAMPLE_CLIPS, find_clip
from sora_models.data.video import VideoError, VideoInfo, decode, iter_frames, probe, to_clip

__all__ = [
    "SAMPLE_CLIPS",
    "VideoError",
    "VideoInfo",
    "decode",
    "find_clip",
    "iter_frames",
    "probe",
    "to_clip",
]
