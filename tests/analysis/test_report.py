"""The page holds everything it shows; what cannot be analysed is refused in one sentence."""

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava_mini.analysis.findings import AnalysisSettings, analyse
from llava_mini.analysis.report import check_output, write_report
from llava_mini.analysis.run import Loading, analyse_model, load_subject
from llava_mini.analysis.samples import record_samples, world_samples
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.evaluation.bench import Bench
from tests.analysis.subjects import asked, ours, peer, save_peer
from tests.tiny_engine import picture, save_tiny

BENCH = Bench(
    world=WorldSettings(image_kinds={"colour": 1.0, "caption": 1.0}, clip_kinds={"moving": 1.0}, clip_share=0.5)
)
FEW = AnalysisSettings(examples=2, dropped=1, max_tokens=4)


class Addresses(HTMLParser):
    """Everything that a page would load or lead to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "page"
    subject = ours(reducer_grid=2)
    questions = [asked(), asked(frames=3, question="What <moves> & costs $1 or $2?")]
    return write_report(folder, subject, analyse(subject, questions, FEW), FEW, {"data": "two questions"})


def test_the_page_needs_no_other_file_and_no_network(page):
    text = page.read_text(encoding="utf-8")
    parser = Addresses()
    parser.feed(text)
    assert len(parser.found) >= 8
    assert all(address.startswith("data:image/png;base64,") for address in parser.found)
    words = re.sub(r'"data:image/png;base64,[^"]*"', "", text)
    assert "http" not in words
    assert "url(" not in words
    assert "@import" not in words
    assert "<script" not in words


def test_what_was_typed_is_shown_as_typed(page):
    assert "<moves>" not in page.read_text(encoding="utf-8")


def test_every_file_is_named_and_can_be_read(page):
    about = json.loads((page.parent / "about.json").read_text())
    assert sorted(path.name for path in page.parent.iterdir()) == about["files"]
    pictures, tables = ([name for name in about["files"] if name.endswith(end)] for end in (".png", ".csv"))
    assert {"attention.png", "entropy.png", "dropped.png", "prefusion.png", "queries.png", "map-1.png"} <= {*pictures}
    assert {"frames-2.png", "words-1.png", "words-2.png"} <= {*pictures}
    for name in pictures:
        with Image.open(page.parent / name) as image:
            assert min(image.size) > 100
    for name in tables:
        rows = list(csv.DictReader((page.parent / name).open()))
        assert rows
        assert all(None not in row and None not in row.values() for row in rows)
    assert not [path for path in page.parent.parent.iterdir() if path.name.startswith(".")]


def test_an_earlier_analysis_is_replaced_and_other_files_are_not(page, tmp_path):
    check_output(page.parent)
    folder = tmp_path / "mine"
    folder.mkdir()
    check_output(folder)
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match=r"holds 'thesis\.txt', which no analysis wrote"):
        check_output(folder)
    with pytest.raises(ValueError, match="is a file"):
        check_output(folder / "thesis.txt")


def test_pages_of_all_models_are_drawn(tmp_path):
    for number, subject in enumerate((ours(reducer="identity", prefusion_num_layers=0), peer("llava_next"))):
        found = analyse(subject, [asked(size=(30, 10))], FEW)
        made = write_report(tmp_path / str(number), subject, found, FEW, {})
        assert (made.parent / "map-1.png").exists()
        assert (made.parent / "read-1.png").exists()
        assert not (made.parent / "prefusion.png").exists()


def test_the_page_says_which_words_and_queries_have_no_picture(page):
    text = page.read_text(encoding="utf-8")
    assert "the last 10 words are drawn; the table has all" in text
    assert "Of more than 3 queries the first are drawn; the table has all" in text


def test_right_answers_in_the_data_can_stand_for_the_models_own():
    subject = ours()
    settings = AnalysisSettings(answers="data", examples=0, dropped=0, max_tokens=8)
    found = analyse(subject, [asked()], settings)
    assert found.response_tokens == [len(subject.ids_of("red"))]
    assert not found.dropped
    assert not found.examples


def test_world_questions_alternate_between_kinds_without_descriptions():
    assert [one.name for one in world_samples(BENCH, 4, videos=True)] == [
        "colour 0",
        "moving 0",
        "colour 1",
        "moving 1",
    ]
    images = list(world_samples(BENCH, 3, videos=False))
    assert [one.name for one in images] == ["colour 0", "colour 1", "colour 2"]
    assert images[0].right(images[0].answer) == 1
    assert images[0].right("nonsense") == 0
    assert images[0].question.endswith("?")


def records(folder, *conversations):
    picture().save(folder / "one.png")
    path = folder / "records.json"
    path.write_text(json.dumps([{"id": str(index), **one} for index, one in enumerate(conversations)]))
    return path


def talk(question, **media):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Red."}]
    return {"conversations": turns, **media}


def test_records_without_a_picture_are_passed_over_and_none_with_one_is_refused(tmp_path):
    path = records(tmp_path, talk("Hello"), talk("<image>\nWhat?", image="one.png"))
    (one,) = record_samples(Mixture([DataFile(path=path)]), 5, videos=True)
    assert (one.name, one.question, one.answer) == ("records/1", "What?", "Red.")
    assert one.right("red") == 1
    assert one.right("blue") == 0
    path = records(tmp_path, talk("Hello"))
    with pytest.raises(ValueError, match="None of the 1 records .* about an image or a video"):
        list(record_samples(Mixture([DataFile(path=path)]), 5, videos=True))


def test_a_video_is_refused_for_a_model_of_images(tmp_path):
    path = records(tmp_path, talk("<video>\nWhat?", video="one.mp4"))
    with pytest.raises(ValueError, match="shows a video, which this model does not read"):
        list(record_samples(Mixture([DataFile(path=path)]), 5, videos=False))


def test_a_model_of_transformers_is_read_from_its_folder(tmp_path):
    subject = load_subject(Loading(model=str(save_peer("llava", tmp_path / "llava")), device="cpu"))
    assert (subject.family, subject.reads_videos, len(subject.attentions)) == ("LLaVA-1.5", False, 3)


def test_an_unknown_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="is a BertModel. An analysis reads a LLaVA-Mini, or"):
        load_subject(Loading(model=str(tmp_path)))
    with pytest.raises(ValueError, match="There is no model"):
        load_subject(Loading(model="nobody knows"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"samples": 0}, "at least one question"),
        ({"data": ("world", "records.json")}, "cannot be mixed with files"),
        ({"data": ("nowhere.json",)}, "no data file 'nowhere.json'"),
    ],
)
def test_requests_that_cannot_be_are_refused_before_a_model_is_loaded(tmp_path, change, match):
    given = {"data": ("world",), "bench": BENCH, "samples": 1, **change}
    with pytest.raises(ValueError, match=match):
        analyse_model(Loading(model="nobody knows"), output=tmp_path / "page", settings=FEW, **given)
    assert not list(tmp_path.iterdir())


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_tokens is 0; it must be 1 or more"):
        AnalysisSettings(max_tokens=0)


def test_a_folder_and_drawn_scenes_make_a_page(tmp_path):
    folder = save_tiny(tmp_path / "model")
    loading = Loading(model=str(folder), device="cpu", dtype="float32")
    page = analyse_model(loading, ["world"], tmp_path / "page", FEW, bench=BENCH, samples=2)
    assert json.loads((page.parent / "about.json").read_text())["questions"] == 2
    rows = list(csv.DictReader((page.parent / "pointing.csv").open()))
    assert {row["where"] for row in rows} == {"pre-fusion"}
    assert [row["about"] for row in csv.DictReader((page.parent / "dropped.csv").open())][-1] == "images"


def test_a_question_in_any_script_is_on_the_page(tmp_path, recwarn):
    subject = ours()
    found = analyse(subject, [asked(question="\u8fd9\u662f\u4ec0\u4e48\uff1f")], FEW)
    page = write_report(tmp_path / "page", subject, found, FEW, {})
    assert "\u8fd9\u662f\u4ec0\u4e48" in page.read_text(encoding="utf-8")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
