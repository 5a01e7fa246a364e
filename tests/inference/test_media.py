"""What people give becomes message parts that say what they are."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini.inference.media import media_parts


def kinds(media):
    return [part["type"] for part in media_parts(media)]


@pytest.fixture
def files(tmp_path):
    """A picture, an animation and a film, with names that say nothing."""
    pictures = [Image.new("RGB", (16, 16), color) for color in ("red", "blue", "green")]
    pictures[0].save(tmp_path / "a", "PNG")
    pictures[0].save(tmp_path / "b", "GIF", save_all=True, append_images=pictures[1:])
    with av.open(str(tmp_path / "c"), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return [tmp_path / name for name in "abc"]


def test_files_are_told_apart_by_their_content(files):
    assert kinds(files) == ["image", "video", "video"]
    assert kinds([str(path) for path in files]) == ["image", "video", "video"]


def test_one_medium_needs_no_list(files):
    assert media_parts(files[0]) == [{"type": "image", "image": files[0]}]
    assert media_parts(str(files[2])) == [{"type": "video", "video": str(files[2])}]
    assert media_parts(()) == []


def test_arrays_with_four_dimensions_and_iterators_are_videos():
    picture, film = np.zeros((4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)
    assert kinds([picture, film, torch.tensor(picture), torch.tensor(film), iter([picture])]) == [
        *("image", "video") * 2,
        "video",
    ]
    assert kinds(Image.new("L", (3, 3))) == ["image"]


def test_a_part_that_says_what_it_is_stays_as_it_is(files):
    part = {"type": "image", "image": files[1]}
    assert media_parts([part]) == [part]


def test_what_is_neither_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="neither an image nor a video"):
        media_parts(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="A int is neither an image nor a video"):
        media_parts([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"There is no file 'nowhere\.png'"):
        media_parts("nowhere.png")
