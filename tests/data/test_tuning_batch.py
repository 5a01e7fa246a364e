import json
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llava_mini.data.llava_format import sample_from_record
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.order import BatchOrder
from llava_mini.data.samples import MediaFile, Sample
from llava_mini.data.synthetic.export import ExportSettings, export_world, write_film
from llava_mini.data.tuning_batch import IGNORED, MAX_FRAMES, TuningBatches, TuningCollator
from llava_mini.training.prefetch import Prefetch
from tests.parity.pixels import make_processor

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
TEMPLATES = {"llama_3_1": "llama_3_1", "v1": "llava_v1", "plain": "plain"}
PLACEHOLDER = -200


def processor(template: str = "llava_v1", **fields: Any):
    tokenizer = "llama3_tiny" if template == "llama_3_1" else "vicuna_tiny"
    return make_processor(FIXTURES, tokenizer, template, **fields)


def collator(template: str = "llava_v1", *, fields: dict[str, Any] | None = None, **settings: Any) -> TuningCollator:
    return TuningCollator(processor(template, **(fields or {})), **settings)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for color in ("red", "green", "blue"):
        Image.new("RGB", (20, 12), color).save(folder / f"{color}.png")
        (folder / f"cut_{color}.png").write_bytes((folder / f"{color}.png").read_bytes()[:45])
    shades = [Image.new("RGB", (16, 16), (40 * shade, 0, 0)) for shade in range(5)]
    write_film(folder / "film.mp4", shades)
    film = (folder / "film.mp4").read_bytes()
    frames = film.index(b"mdat") + 4
    (folder / "cut.mp4").write_bytes(film[: (frames + 9 * len(film)) // 10])
    (folder / "head.mp4").write_bytes(film[:frames])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.png").write_bytes(b"this is no picture")
    return folder


def sample(media: Path, question: str, answer: str = "It is red.", *, name: str = "1", **files: Any) -> Sample:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return sample_from_record({"conversations": turns, **files}, name=f"set/{name}", media_folder=media)


def row(batch, number: int = 0) -> tuple[list[int], list[int]]:
    """Ids and labels of a prompt without padding."""
    kept = batch.inputs.attention_mask[number].bool()
    return batch.inputs.input_ids[number][kept].tolist(), batch.inputs.labels[number][kept].tolist()


def learned(batch, tokenizer, number: int = 0) -> str:
    return tokenizer.decode([label for label in row(batch, number)[1] if label != IGNORED])


def test_labels_equal_the_released_masks_where_those_teach_something(media):
    stored = json.loads((FIXTURES / "preprocess" / "label_masks.json").read_text())["items"]
    compared = 0
    for item in stored:
        if all(label == IGNORED for label in item.get("labels", [IGNORED])) or not item["conversation"][-1][1]:
            continue
        template, _, variant = item["template"].partition("_legacy")
        fields = {"legacy": bool(variant)}
        turns = [{"from": speaker, "value": text} for speaker, text in item["conversation"]]
        files = {"text": {}, "image": {"image": "red.png"}, "video": {"video": "film.mp4"}}[item["kind"]]
        one = sample_from_record({"conversations": turns, **files}, name="set/1", media_folder=media)
        made = collator(TEMPLATES[template], fields=fields, num_frames=1, captions=template == "plain")
        batch = made([one])
        assert not batch.damaged
        ids, labels = row(batch)
        ids = [PLACEHOLDER if token == made.processor.image_token_id else token for token in ids]
        if item["kind"] == "video":  # there, its place is made of letters
            assert PLACEHOLDER in ids
            taught = [[label for label in all_labels if label != IGNORED] for all_labels in (labels, item["labels"])]
            assert taught[0] == taught[1]
        else:
            assert ids == item["input_ids"][: len(ids)]
            assert labels == item["labels"][: len(ids)]
            assert all(label == IGNORED for label in item["labels"][len(ids) :])
        compared += 1
    assert compared == 21


def test_only_answers_and_their_ends_are_learned(media):
    made = collator()
    one = sample_from_record(
        {
            "image": "red.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat color?"},
                {"from": "gpt", "value": "red"},
                {"from": "human", "value": "Say red again."},
                {"from": "gpt", "value": "red"},
            ],
        },
        name="set/1",
        media_folder=media,
    )
    batch = made([one, sample(media, "Hello?", "yes")])
    assert [learned(batch, made.processor.tokenizer, number) for number in range(2)] == ["red</s> red</s>", "yes</s>"]
    assert batch.num_supervised == sum(label != IGNORED for number in range(2) for label in row(batch, number)[1])
    assert torch.equal(batch.inputs.answer_mask.bool(), batch.inputs.labels != IGNORED)


def test_control_tokens_that_somebody_typed_are_characters(media):
    made = collator()
    tokenizer = made.processor.tokenizer
    batch = made([sample(media, "</s> <image>\nWhat?", "An <image> </s> tag", image="red.png")])
    ids, _ = row(batch)
    assert ids.count(tokenizer.eos_token_id) == ids.count(made.processor.image_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert len(batch.inputs.pixel_values) == 1


def test_a_mixed_batch_gives_what_its_samples_give_alone(media):
    made = collator(fields={"tokens_per_frame": 4, "resolution_ratio": 2})
    samples = [
        sample(media, "Hello?", name="text"),
        sample(media, "<image>\nWhat?", image="red.png", name="image"),
        sample(media, "<video>\nWhat happens?", video="film.mp4", name="film"),
        sample(media, "<image> or <image>?", image=["green.png", "blue.png"], name="two"),
    ]
    batch = made(samples)
    assert batch.ids == ("set/text", "set/image", "set/film", "set/two")
    assert batch.inputs.pixel_values.shape == (0 + 1 + 5 + 2, 5, 3, 8, 8)
    alone = [made([one]) for one in samples]
    assert [row(batch, number) for number in range(4)] == [row(one) for one in alone]
    pixels = torch.cat([one.inputs.pixel_values for one in alone[1:]])
    assert torch.equal(batch.inputs.pixel_values, pixels)
    places = (batch.inputs.input_ids == made.processor.image_token_id).sum(1)
    assert places.tolist() == [0, 4, 20, 8]
    assert alone[0].inputs.pixel_values is None
    assert batch.inputs.input_ids.shape[1] % 8 == 0


@pytest.mark.parametrize(
    ("settings", "frames"),
    [
        ({}, 5),
        ({"max_frames": 2}, 2),
        ({"max_frames": None}, 5),
        ({"num_frames": 8}, 8),
        ({"num_frames": 3}, 3),
        ({"fps": 0.4}, 2),
        ({"fps": 8, "max_frames": 6}, 6),
        ({"fps": 8}, MAX_FRAMES),
    ],
)
def test_a_video_has_one_frame_per_second_up_to_a_cap_unless_told_otherwise(media, settings, frames):
    made = collator(**settings)
    batch = made([sample(media, "<video>\nWhat happens?", video="film.mp4")])
    assert len(batch.inputs.pixel_values) == frames
    assert row(batch)[0].count(made.processor.image_token_id) == frames
    assert all(first.mean() <= second.mean() for first, second in pairwise(batch.inputs.pixel_values))


@pytest.mark.parametrize(
    ("files", "fault", "reason"),
    [
        ({"image": "absent.png"}, "absent.png", "There is no file"),
        ({"image": "cut_red.png"}, "cut_red.png", "truncated or damaged"),
        ({"image": "noise.png"}, "noise.png", "neither an image nor a video"),
        ({"image": "film.mp4"}, "film.mp4", "is a video, not an image"),
        ({"image": "."}, "", "is not a file"),
        ({"image": "https://example.org/a.png"}, "https://example.org/a.png", "addresses are not fetched"),
        ({"image": "data:image/png;base64,AAAA"}, "a data: address of 26 characters", "neither an image nor a video"),
        ({"video": "red.png"}, "red.png", "is an image, not a video"),
        ({"video": "empty.mp4"}, "empty.mp4", "neither an image nor a video"),
        ({"video": "head.mp4"}, "head.mp4", ""),
        ({"video": "cut.mp4"}, "cut.mp4", "is damaged after"),
    ],
)
def test_a_damaged_medium_is_left_out_with_its_reason_and_the_others_stay(media, files, fault, reason):
    good = sample(media, "<image>\nWhat?", image="green.png", name="good")
    bad = sample(media, "<image>\nWhat?", name="bad", **files)
    made = collator()
    batch = made([bad, good])
    (damaged,) = batch.damaged
    assert damaged.id == "set/bad"
    assert damaged.media.endswith(fault)
    assert damaged.media
    assert reason in damaged.reason
    assert "\n" not in damaged.reason
    assert batch.num_samples == 2
    assert batch.ids == ("set/good",)
    assert torch.equal(batch.inputs.pixel_values, made([good]).inputs.pixel_values)


def test_the_file_at_fault_among_several_is_named(media):
    one = sample(media, "<image><image><image>?", image=["red.png", "cut_green.png", "blue.png"])
    assert [Path(damaged.media).name for damaged in collator()([one]).damaged] == ["cut_green.png"]


def test_a_batch_of_damaged_samples_alone_has_no_inputs(media):
    batch = collator()([sample(media, "<image>?", image="absent.png", name=name) for name in "ab"])
    assert batch.inputs is None
    assert [damaged.id for damaged in batch.damaged] == ["set/a", "set/b"]
    assert (batch.ids, batch.num_samples, batch.num_supervised) == ((), 2, 0)


def test_a_long_text_is_cut_at_its_end(media):
    long, short = sample(media, "Hello?", "It is red. " * 50, name="long"), sample(media, "Hello?", name="short")
    whole, cut = (row(collator(max_length=limit)([long])) for limit in (None, 200))
    assert cut == (whole[0][:200], whole[1][:200])
    batch = collator(max_length=200)([long, short])
    assert batch.cut == ("set/long",)
    assert batch.inputs.input_ids.shape == (2, 200)


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What? " * 90 + "First: <image> second: <image>", "Red.", "it lacks 2 tokens of its frames"),
        ("<image>First<image>" + "What? " * 90, "Red.", "it lacks all its answers"),
    ],
)
def test_a_sample_that_cannot_be_cut_is_damaged(media, question, answer, reason):
    one = sample(media, question, answer, image=["red.png", "blue.png"])
    (damaged,) = collator(max_length=200)([one]).damaged
    assert reason in damaged.reason
    assert "max_length=200" in damaged.reason
    assert damaged.media == ""


def test_bytes_are_read_like_files(media):
    files = (
        sample(media, "<image>?", image="red.png"),
        sample(media, "<video>?", video="film.mp4"),
    )
    for one in files:
        (medium,) = one.media
        streamed = Sample(
            id=one.id,
            messages=one.messages,
            media=(MediaFile(kind=medium.kind, source=Path(medium.source).read_bytes()),),  # type: ignore[arg-type]
        )
        assert torch.equal(collator()([streamed]).inputs.pixel_values, collator()([one]).inputs.pixel_values)


def test_damaged_bytes_are_named_by_their_size_alone(media):
    messages = sample(media, "<video>?", video="film.mp4").messages
    one = Sample(id="shard/1", messages=messages, media=(MediaFile(kind="video", source=b"noise"),))
    (damaged,) = collator()([one]).damaged
    assert damaged.media == "5 bytes of a record"
    assert damaged.reason.startswith("The file of the record is neither")


def test_captions_follow_their_image_without_the_question(media):
    made = collator("plain", captions=True)
    batch = made([sample(media, "Describe it.\n<image>", "A red square.", image="red.png")])
    tokenizer = made.processor.tokenizer
    ids, _ = row(batch)
    assert ids[:2] == [tokenizer.bos_token_id, made.processor.image_token_id]
    assert tokenizer.decode(ids[2:]) == learned(batch, tokenizer) == "A red square.\n"


def test_a_text_alone_is_no_caption(media):
    (damaged,) = collator("plain", captions=True)([sample(media, "Hello?")]).damaged
    assert "its first question shows no image or video" in damaged.reason


def test_a_template_without_system_texts_leaves_those_samples_out(media):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi?"},
        {"from": "gpt", "value": "Hi."},
    ]
    one = sample_from_record({"conversations": turns}, name="set/1", media_folder=media)
    assert "no system messages" in collator("tiny")([one]).damaged[0].reason
    assert not collator()([one]).damaged


@pytest.mark.parametrize("settings", [{"max_length": 0}, {"num_frames": 2, "fps": 1.0}, {"max_frames": 0}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="max_length is 0|exclude one another|max_frames is 0"):
        collator(**settings)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The drawn world as files, with a malformed record and one whose image is missing."""
    folder = tmp_path_factory.mktemp("world")
    export_world(folder, ExportSettings(images=8, clips=3, questions=2), processes=1)
    records = json.loads((folder / "train.json").read_text())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records += [{"id": "malformed", "conversations": turns}, {"id": "absent", "image": "no", "conversations": turns}]
    (folder / "train.json").write_text(json.dumps(records))
    mixture = Mixture([DataFile(path=folder / "train.json")])
    order = BatchOrder(mixture, batch_size={"text": 1, "image": 4, "video": 1}, seed=0)
    return TuningBatches(samples=mixture, order=order, collator=collator(fields={"image_size": 28}))


def test_a_run_sees_every_sample_once_or_says_why_not(batches):
    made = [batches(index) for index in range(batches.order.num_batches)]
    ids = [name for batch in made for name in batch.ids]
    damaged = {one.id: one.reason for batch in made for one in batch.damaged}
    assert len(ids) == len(set(ids)) == 11
    assert set(damaged) == {"train/malformed", "train/absent"}
    assert "names no image and no video" in damaged["train/malformed"]
    assert "There is no file" in damaged["train/absent"]
    assert sum(batch.num_samples for batch in made) == 13


def test_other_samples_and_other_orders_have_other_fingerprints(batches, tmp_path):
    (tmp_path / "train.json").write_text('[{"conversations": []}]')
    other = replace(batches, samples=Mixture([DataFile(path=tmp_path / "train.json")]))
    shuffled = replace(batches, order=BatchOrder(batches.samples, batch_size=4, seed=1))
    assert len({batches.fingerprint, other.fingerprint, shuffled.fingerprint}) == 3
    assert pickle.loads(pickle.dumps(batches)).fingerprint == batches.fingerprint


def test_batches_are_the_same_in_other_processes_and_from_any_place_on(batches):
    first = 3
    expected = [batches(index) for index in range(first, 2 * batches.order.num_batches)]
    with Prefetch(pickle.loads(pickle.dumps(batches)), workers=2) as made_ahead:
        resumed = [made_ahead(index) for index in range(first, 2 * batches.order.num_batches)]
    assert len(resumed) > 8
    for ours, theirs in zip(expected, resumed, strict=True):
        assert (ours.ids, ours.damaged) == (theirs.ids, theirs.damaged)
        if ours.inputs is not None:
            for name in ("input_ids", "labels", "attention_mask", "answer_mask", "pixel_values"):
                tensors = getattr(ours.inputs, name), getattr(theirs.inputs, name)
                assert tensors == (None, None) or torch.equal(*tensors)
