"""Draw docs/world.png, a page of samples of the drawn world, and write the table of its questions into docs/world.md.

Run:  python docs/world.py
"""

import textwrap
from collections import defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.blind import BlindBaseline
from llava_mini.data.synthetic.drawing import draw_scene
from llava_mini.data.synthetic.fonts import FONTS
from llava_mini.data.synthetic.scenes import BACKGROUNDS, Background, Scene, SceneSettings, Sign, random_scene
from llava_mini.data.synthetic.splits import Split, generator_of
from llava_mini.data.synthetic.world import CLIP_KINDS, IMAGE_KINDS, WorldItem, WorldSettings, world_item

PAGE = Path(__file__).with_name("world.md")
BEGIN, END = "<!-- table made by world.py -->\n", "<!-- end of the table -->\n"

BALANCE = {
    "existence": "yes and no alike; what is not there mostly has the colour or the shape of a thing that is",
    "colour": "ten colours, equally often",
    "shape": "eight shapes, equally often",
    "size": "small and large alike",
    "count": "0 to 8 things",
    "attribute count": "0 in a fifth of the questions; otherwise larger numbers are preferred",
    "location": "nine places; things near the border between two are not asked about",
    "relation": "two sides alike, yes and no alike; the things are at least 8 of 96 units apart",
    "compare": "the larger is named first as often as second",
    "text": "words from a list, numbers of one to three digits; sometimes nothing is written",
    "chart": "two to five bars of values 1 to 9, one tallest, one shortest",
    "absence": "words of other kinds, of a thing that is not there; the blind guess is told the kind, so it knows",
    "cannot tell": "always the same answer: about sound, smell, weight, owners; the blind guess is told the kind",
    "caption": "all things in reading order",
    "direction": "four directions alike",
    "moving": "moving and still alike; also the direction of a thing that does not move",
    "order": "before and after alike; the first is named first as often as second",
    "change": "also asked where nothing changes, appears or disappears",
    "event count": "0 where nothing does so; otherwise larger numbers are preferred",
    "clip place": "nine places, at the start or at the end",
    "clip colour": "ten colours; of a thing that keeps it",
    "clip absence": "as absence and cannot tell, about a clip",
    "clip caption": "what happens, in order",
}
"""How the answers to each kind of question are spread."""

PICTURES = (
    ("existence", "existence"),
    ("colour", "shape"),
    ("size", "compare"),
    ("count", "attribute count"),
    ("location", "location"),
    ("relation", "relation"),
    ("compare", "relation"),
    ("text", "existence"),
    ("chart", "chart"),
    ("chart", "cannot tell"),
    ("absence", "colour"),
    ("caption",),
)
CLIPS = (("direction", "clip place"), ("order", "event count"), ("change", "clip colour"), ("moving", "clip absence"))
NUM_FRAMES = 4
"""Of the clips on the page."""

SCALE = 2
SIDE = 96 * SCALE
STEP, MARGIN, LINE = SIDE + 12, 20, 18
WIDTH, MAX_LINES = 29, 8
"""Letters of a line below a picture, and most lines of its questions and answers."""
INK, QUIET, PAPER = "#1c1c1c", "#6a6a6a", "#ffffff"


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of the captions."""
    return ImageFont.load_default(size=size)


def sample(kinds: tuple[str, ...], number: int, settings: WorldSettings) -> WorldItem:
    """The first item of a sequence with questions of these kinds, with different answers, that fit the page."""
    for index in range(100_000):
        item = world_item("validation", index, settings, stream=f"page {number}")
        if settings.clip_share and (len(item.frames) != NUM_FRAMES or "; then " not in item.description):
            continue
        texts = [text for turn in item.turns for text in (turn.question, turn.answer)]
        if sum(len(textwrap.wrap(text, WIDTH)) for text in texts) > MAX_LINES:
            continue
        answers, found = {turn.answer for turn in item.turns}, {turn.kind for turn in item.turns}
        told = not settings.clip_share or not answers & {"no", "nothing"}
        if len(answers) == len(kinds) and found == set(kinds) and told:
            return item
    raise ValueError(f"No picture has questions of the kinds {kinds}.")


def samples() -> tuple[list[WorldItem], list[WorldItem]]:
    """The pictures and the clips of the page."""
    pictures = []
    for number, kinds in enumerate(PICTURES):
        scene = SceneSettings(
            min_things=2 + number % 5, max_things=4 + number % 5, chart_share=float("chart" in kinds), sign_share=0.4
        )
        image_kinds = dict.fromkeys(kinds, 1.0)
        settings = WorldSettings(scene=scene, image_kinds=image_kinds, min_turns=len(kinds), max_turns=len(kinds))
        pictures.append(sample(kinds, number, settings))
    clips = []
    for number, kinds in enumerate(CLIPS):
        clip_kinds = dict.fromkeys(kinds, 1.0)
        settings = WorldSettings(clip_kinds=clip_kinds, clip_share=1.0, min_turns=len(kinds), max_turns=len(kinds))
        clips.append(sample(kinds, number, settings))
    return pictures, clips


def enlarged(scene: Scene) -> Image.Image:
    """The pixels that the model sees, each ``SCALE`` pixels wide."""
    picture = draw_scene(scene)
    return picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)


def write_turns(draw: ImageDraw.ImageDraw, turns: tuple[Turn, ...], x: int, y: int, width: int) -> None:
    """Questions with their answers, in lines of ``width`` letters."""
    for turn in turns:
        for line in textwrap.wrap(turn.question, width):
            draw.text((x, y), line, QUIET, font(14))
            y += LINE
        for line in textwrap.wrap(turn.answer, width):
            draw.text((x, y), line, INK, font(15))
            y += LINE
        y += 4


def heading(draw: ImageDraw.ImageDraw, text: str, y: int) -> int:
    """Write a heading; returns where what follows begins."""
    draw.text((MARGIN, y), text, INK, font(20))
    return y + 34


def tile(page: Image.Image, draw: ImageDraw.ImageDraw, scene: Scene, label: str, x: int, y: int) -> None:
    """A picture with one word below."""
    page.paste(enlarged(scene), (x, y))
    draw.text((x, y + SIDE + 4), label, QUIET, font(14))


def background_of(kind: str) -> Scene:
    """An example of a background, with a few things on it."""
    for index in range(10_000):
        scene = random_scene(
            generator_of("validation", index, "backgrounds"), SceneSettings(min_things=2, max_things=4)
        )
        if scene.background.kind == kind and not scene.signs:
            return scene
    raise ValueError(f"There is no background {kind!r}.")


def sign_in(name: str, text: str) -> Scene:
    """A word in one of the fonts."""
    sign = Sign(text=text, x=48, y=48, height=20, font=name, ink=(20, 20, 20), plate=(235, 235, 235), bold=False)
    return Scene(things=(), signs=(sign,), background=Background(kind="plain", colour=(140, 150, 150), seed=0))


def charts() -> list[Scene]:
    """A chart on a light board and one on a dark one."""
    settings = SceneSettings(chart_share=1.0)
    found = {}
    for index in range(40):
        scene = random_scene(generator_of("validation", index, "charts"), settings)
        assert scene.chart is not None
        found.setdefault(scene.chart.plate > 127, scene)
    return [found[True], found[False]]


def draw_page() -> Image.Image:
    """The whole page."""
    pictures, clips = samples()
    page = Image.new("RGB", (2 * MARGIN + 6 * STEP - 12, 3000), PAPER)
    draw = ImageDraw.Draw(page)
    y = heading(draw, "Pictures, with some of their questions", MARGIN)
    for number, item in enumerate(pictures):
        x, top = MARGIN + number % 6 * STEP, y + number // 6 * (SIDE + (MAX_LINES + 1) * LINE)
        page.paste(enlarged(item.frames[0]), (x, top))
        write_turns(draw, item.turns, x, top + SIDE + 6, WIDTH)
    y = heading(draw, "Clips, one frame a second", y + 2 * (SIDE + (MAX_LINES + 1) * LINE))
    for item in clips:
        for number, scene in enumerate(item.frames):
            page.paste(enlarged(scene), (MARGIN + number * STEP, y))
        write_turns(draw, item.turns, MARGIN + NUM_FRAMES * STEP + 6, y + 6, 2 * WIDTH)
        y += SIDE + 12
    y = heading(draw, "Backgrounds", y + 16)
    for number, kind in enumerate(BACKGROUNDS):
        tile(page, draw, background_of(kind), kind, MARGIN + number * STEP, y)
    y = heading(draw, "Fonts and charts", y + SIDE + 40)
    words = zip(FONTS, ("STOP", "BIRD", "42", "907"), strict=True)
    for number, (name, text) in enumerate(words):
        tile(page, draw, sign_in(name, text), name, MARGIN + number * STEP, y)
    for number, scene in enumerate(charts(), start=len(FONTS)):
        tile(page, draw, scene, "chart", MARGIN + number * STEP, y)
    return page.crop((0, 0, page.width, y + SIDE + 30 + MARGIN // 2))


def turns_by_kind(split: Split, count: int) -> dict[str, list[Turn]]:
    """Questions of so many images and clips, by kind."""
    found: dict[str, list[Turn]] = defaultdict(list)
    for clip_share in (0.0, 1.0):
        settings = WorldSettings(clip_share=clip_share, min_turns=6, max_turns=6)
        for index in range(count):
            for turn in world_item(split, index, settings).turns:
                found[turn.kind].append(turn)
    return found


def table(count: int = 1500) -> str:
    """The kinds of questions, with an example of each and what a blind guess gets right, as Markdown."""
    train, test = turns_by_kind("train", count), turns_by_kind("test", count)
    lines = ["| kind | an example | answers | blind |", "|---|---|---|---|"]
    for kind in (*IMAGE_KINDS, *CLIP_KINDS):
        turn = next(turn for turn in test[kind] if not turn.held_out)
        example = f"{turn.question} *{turn.answer}*"
        lines.append(f"| {kind} | {example} | {BALANCE[kind]} | {BlindBaseline(train[kind]).score(test[kind]):.2f} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, made: str) -> str:
    """The text of the page with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    """Write both files."""
    draw_page().save(PAGE.with_suffix(".png"), optimize=True)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
