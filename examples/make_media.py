"""Draw the files in examples/media: a picture and a clip of the world that the embedded model knows.

Run:  python examples/make_media.py
"""

from dataclasses import replace
from pathlib import Path

import av
from PIL import Image

from llava_mini.data.synthetic.drawing import draw_scene
from llava_mini.data.synthetic.scenes import Background, Scene, Sign, Thing

MEDIA = Path(__file__).parent / "media"
SIDE = 384
"""Pixels per side of the files; the scenes are drawn at 96."""
SECONDS, FRAME_RATE = 5, 8

PICTURE = Scene(
    things=(
        Thing(shape="circle", colour="red", size="large", radius=14, x=22, y=24),
        Thing(shape="star", colour="blue", size="small", radius=8, x=78, y=18),
        Thing(shape="triangle", colour="yellow", size="large", radius=13, x=74, y=72),
    ),
    signs=(Sign(text="STOP", x=28, y=76, height=18, ink=(20, 20, 20), plate=(240, 240, 240), bold=True),),
    background=Background(kind="gradient", colour=(150, 160, 155), seed=1),
)
CLIP = Scene(
    things=(
        Thing(shape="heart", colour="purple", size="large", radius=13, x=18, y=66),
        Thing(shape="square", colour="green", size="small", radius=8, x=50, y=22),
    ),
    signs=(),
    background=Background(kind="plain", colour=(165, 160, 150), seed=2),
)
"""The first frame. The first thing moves to the right."""


def pixels(scene: Scene) -> Image.Image:
    return draw_scene(scene).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def clip_frames() -> list[Image.Image]:
    mover, *others = CLIP.things
    last = SECONDS * FRAME_RATE - 1
    places = [mover.x + (96 - 2 * mover.x) * number / last for number in range(last + 1)]
    return [pixels(replace(CLIP, things=(replace(mover, x=round(x)), *others))) for x in places]


def write_video(path: Path, frames: list[Image.Image]) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"crf": "18"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main() -> None:
    MEDIA.mkdir(exist_ok=True)
    pixels(PICTURE).save(MEDIA / "picture.png", optimize=True)
    write_video(MEDIA / "clip.mp4", clip_frames())


if __name__ == "__main__":
    main()
