"""The processor: everything the model reads, from messages or marked text, saved and loaded, in batches and streams."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, pipeline

from llava_mini.flow import FrameChunk
from llava_mini.processor import LlavaMiniProcessor, load_template
from tests.processor.clips import write_clip
from tests.tiny_models import tiny_config, tiny_model

TOKENIZERS = Path(__file__).parents[1] / "parity/fixtures/tokenizers"
VOCABULARY = 600


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (12, 20, 3), np.uint8)


def make(tokenizer: str = "llama3_tiny", template: str = "llama_3_1", **fields) -> LlavaMiniProcessor:
    sizes = {"image_token_id": VOCABULARY, "tokens_per_frame": 2, "image_size": 8, **fields}
    known = AutoTokenizer.from_pretrained(TOKENIZERS / tokenizer)
    return LlavaMiniProcessor(known, chat_template=load_template(template), **sizes)


def ask(text: str, *media) -> list[dict]:
    """A question about images (arrays with 3 dimensions) and videos (anything else)."""
    kinds = ["image" if isinstance(m, np.ndarray) and m.ndim == 3 else "video" for m in media]
    parts = [{"type": kind, kind: medium} for kind, medium in zip(kinds, media, strict=True)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def tensors(processor: LlavaMiniProcessor, messages, **options):
    defaults = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, **{**defaults, **options})


def num_image_tokens(output) -> list[int]:
    return (output["input_ids"] == VOCABULARY).sum(1).tolist()


def test_every_frame_has_its_tokens_and_pixels_in_prompt_order():
    processor = make()
    first, clip, last = noise(0), noise(1, 3, 12, 20, 3), noise(2)
    output = tensors(processor, ask("What?", first, clip, last))
    assert num_image_tokens(output) == [2 * 5]
    assert output["pixel_values"].shape == (5, 1, 3, 8, 8)
    for index, frame in enumerate((first, *clip, last)):
        alone = tensors(processor, ask("What?", frame))["pixel_values"]
        torch.testing.assert_close(output["pixel_values"][index], alone[0])


def test_the_output_is_what_the_model_accepts_and_nothing_else():
    output = tensors(make(), ask("What?", noise(0)), return_labels=True)
    assert set(output) == {"input_ids", "attention_mask", "answer_mask", "pixel_values", "labels"}
    assert {value.dtype for name, value in output.items() if name != "pixel_values"} == {torch.int64}
    assert set(tensors(make(), ask("What?"))) == {"input_ids", "attention_mask", "answer_mask"}


def test_hd_gives_the_crops_and_the_whole():
    output = tensors(make(resolution_ratio=2), ask("What?", noise(0), noise(1, 2, 9, 9, 3)))
    assert output["pixel_values"].shape == (3, 5, 3, 8, 8)


def test_marked_text_and_messages_give_the_same():
    processor = make()
    messages = ask("What?", noise(0), noise(1, 3, 12, 20, 3))
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    marked = processor(text=text, images=noise(0), videos=noise(1, 3, 12, 20, 3), return_tensors="pt")
    expected = tensors(processor, messages)
    for name, value in expected.items():
        torch.testing.assert_close(marked[name], value, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_its_prompts(side):
    processor = make()
    batch = [
        ask("One?", noise(0)),
        ask("No picture at all, but many words?"),
        ask("Two?", noise(1), noise(2, 3, 8, 8, 3)),
    ]
    together = tensors(processor, batch, padding_side=side)
    singles = [tensors(processor, messages) for messages in batch]
    torch.testing.assert_close(
        together["pixel_values"], torch.cat([single["pixel_values"] for single in singles if "pixel_values" in single])
    )
    for row, single in enumerate(singles):
        kept = together["attention_mask"][row].bool()
        length = single["input_ids"].shape[1]
        assert kept.sum() == length
        assert kept[-length:].all() if side == "left" else kept[:length].all()
        for name in ("input_ids", "answer_mask"):
            torch.testing.assert_close(together[name][row][kept], single[name][0])


def test_batches_are_padded_left_unless_told_otherwise():
    output = tensors(make(), [ask("x"), ask("a longer question")])
    assert output["attention_mask"][0, 0] == 0
    assert output["attention_mask"][:, -1].all()


def test_labels_are_the_answers():
    processor = make()
    messages = [*ask("What?", noise(0)), {"role": "assistant", "content": "A cat."}]
    output = tensors(processor, [messages, ask("q")], add_generation_prompt=False, return_labels=True)
    taught = output["labels"] != -100
    assert torch.equal(taught, output["answer_mask"].bool())
    assert torch.equal(output["labels"][taught], output["input_ids"][taught])
    assert processor.decode(output["labels"][0][taught[0]]) == "A cat.<|eot_id|>"
    assert not taught[1].any()
    masks = tensors(processor, messages, add_generation_prompt=False, return_assistant_tokens_mask=True)
    assert torch.equal(masks["assistant_masks"], masks["answer_mask"])


def test_lists_come_without_return_tensors_and_ids_without_return_dict():
    processor = make()
    assert isinstance(tensors(processor, ask("q"), return_tensors=None)["input_ids"], list)
    ids = processor.apply_chat_template(ask("q"), tokenize=True)
    assert ids == processor.apply_chat_template([ask("q")], tokenize=True)
    assert [len(row) for row in processor(text=["a", "a longer one"])["input_ids"]] != [1, 1]


@pytest.mark.parametrize("videos", ["path", "array", "list", "iterator"])
def test_videos_of_every_form(videos, tmp_path):
    processor = make()
    frames = noise(0, 4, 16, 16, 3)
    forms = {"array": frames, "list": [*frames], "iterator": iter(frames), "path": write_clip(tmp_path / "c.mp4", 40)}
    output = tensors(processor, ask("What?", forms[videos]), return_metadata=True)
    assert output["pixel_values"].shape[0] == 4
    assert num_image_tokens(output) == [8]
    (about,) = output["video_metadata"][0]
    assert about["num_frames"] == 4
    np.testing.assert_allclose(about["times"], [0.5, 1.5, 2.4, 3.4] if videos == "path" else [], atol=0.06)


def test_sampling_of_videos_is_an_option(tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", 20)
    for options, number in (({}, 2), ({"num_frames": 5}, 5), ({"fps": 2}, 4), ({"all_frames": True}, 20)):
        assert tensors(make(), ask("q", clip), **options)["pixel_values"].shape[0] == number
        assert make()(text="<video>", videos=clip, **options)["pixel_values"].shape[0] == number
        chunks = make().stream(ask("q", clip), **options).pixel_values
        assert sum(len(chunk.pixel_values) for chunk in chunks) == number  # type: ignore[union-attr]


def test_a_released_frame_is_squashed_by_nearest_neighbour_before_it_is_split():
    frame = np.zeros((20, 40, 3), np.uint8)
    frame[:, 20:] = 255
    squashed = make(frame_resize="nearest", image_mode="center_crop")
    as_image = make(frame_resize="image_mode", image_mode="pad")
    views = [p(text="<video>", videos=frame[None])["pixel_values"][0, 0] for p in (squashed, as_image)]
    assert views[0].unique().numel() <= 3 * 8  # halves of two colours, and the edge between them
    assert not torch.equal(views[0], views[1])
    image = squashed(text="<image>", images=frame)["pixel_values"][0, 0]
    assert not torch.equal(views[0], image)


def test_a_stream_holds_one_chunk_and_gives_the_frames_of_the_call(tmp_path):
    processor = make()
    clip = write_clip(tmp_path / "clip.mp4", 30)
    messages = ask("What?", noise(0), clip)
    inputs = processor.stream(messages, num_frames=10, frames_per_chunk=4)
    expected = tensors(processor, messages, num_frames=10)
    chunks = list(inputs.pixel_values)  # type: ignore[arg-type]
    assert all(isinstance(chunk, FrameChunk) for chunk in chunks)
    assert [(chunk.slot, len(chunk.pixel_values), len(chunk.times)) for chunk in chunks] == [
        (0, 1, 0),
        (1, 4, 4),
        (1, 4, 4),
        (1, 2, 2),
    ]
    torch.testing.assert_close(torch.cat([chunk.pixel_values for chunk in chunks]), expected["pixel_values"])
    assert (inputs.input_ids == VOCABULARY).sum() == 2
    text = inputs.input_ids[inputs.input_ids != VOCABULARY]
    torch.testing.assert_close(text, expected["input_ids"][expected["input_ids"] != VOCABULARY])
    assert inputs.attention_mask is not None
    assert inputs.answer_mask is not None
    assert inputs.input_ids.shape == inputs.attention_mask.shape == inputs.answer_mask.shape


def test_a_stream_decodes_while_it_is_read():
    read = []

    def frames():
        for index in range(100):
            read.append(index)
            yield noise(index, 8, 8, 3)

    chunks = iter(make().stream(ask("q", frames()), frames_per_chunk=4).pixel_values)  # type: ignore[arg-type]
    assert read == []
    next(chunks)
    assert len(read) <= 5


def test_a_missing_file_is_noticed_before_the_stream_is_read():
    for kind in ("image", "video"):
        part = {"type": kind, "path": "missing.mp4"}
        with pytest.raises(ValueError, match="There is no file"):
            make().stream([{"role": "user", "content": [part, {"type": "text", "text": "q"}]}])


def test_text_alone_streams_no_pixels():
    assert make().stream(ask("Hello?")).pixel_values is None


def test_the_length_of_a_prompt_is_told_without_reading_its_media():
    processor = make()
    messages = ask("What is it?", noise(0))
    ids = tensors(processor, messages)["input_ids"][0]
    assert processor.prompt_length(messages) == (ids != VOCABULARY).sum()
    assert processor.prompt_length([{"role": "user", "content": [{"type": "video", "path": "later.mp4"}]}]) > 0


def test_saving_and_loading_changes_nothing(tmp_path):
    processor = make("vicuna_tiny", "vicuna_v1", image_mode="squash", frame_resize="nearest", num_begin_tokens=2)
    processor.save_pretrained(tmp_path)
    assert {"processor_config.json", "chat_template.jinja"} <= {path.name for path in tmp_path.iterdir()}
    loaded = LlavaMiniProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    messages = ask("What </s>?", noise(0), noise(1, 2, 9, 9, 3))
    for name, value in tensors(processor, messages).items():
        torch.testing.assert_close(tensors(loaded, messages)[name], value)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


def test_the_auto_class_finds_it_and_fields_can_be_overridden(tmp_path):
    tiny_config(text={"vocab_size": VOCABULARY}).save_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, image_mode="squash")
    assert isinstance(loaded, LlavaMiniProcessor)
    assert loaded.image_mode == "squash"


def test_a_saved_file_with_unknown_keys_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_modus": "pad"}))
    with pytest.raises(ValueError, match="unknown keys image_modus"):
        LlavaMiniProcessor.from_pretrained(tmp_path)


def test_a_configuration_makes_a_processor():
    config = tiny_config(text={"vocab_size": VOCABULARY}, resolution_ratio=2, reducer_grid=2)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / "llama3_tiny")
    processor = LlavaMiniProcessor.from_config(config, tokenizer, num_begin_tokens=2, image_mode="center_crop")
    output = tensors(processor, ask("q", noise(0)))
    assert output["pixel_values"].shape == (1, 5, 3, 8, 8)
    assert num_image_tokens(output) == [4]
    assert output["input_ids"][0, :3].tolist() == [512, 512, 518]
    assert processor.chat_template == load_template("llama_3_1")


def test_the_model_answers_what_the_processor_made_and_the_pipeline_uses_both(tmp_path):
    model = tiny_model(text={"vocab_size": VOCABULARY, "max_position_embeddings": 512}).eval()
    processor = make(tokens_per_frame=1)
    messages = ask("What is it?", noise(0))
    inputs = tensors(processor, messages)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    images = [{"type": "image", "image": Image.fromarray(noise(0))}, messages[0]["content"][1]]
    (out,) = pipe(
        text=[{"role": "user", "content": images}],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 4, "do_sample": False, "eos_token_id": None},
    )
    assert out["generated_text"] == answer


IMAGES = {
    "one": (noise(0), "<image> a", 1),
    "flat": ([noise(0), noise(1)], ["<image> a", "<image> b"], 2),
    "flat, not one each": ([noise(0), noise(1)], ["<image><image> a", "b"], 2),
    "by prompt": ([[noise(0)], [], [noise(1)]], ["<image> a", "b", "c <image>"], 2),
    "by prompt, for one": ([[noise(0), noise(1)]], "<image> a <image>", 2),
    "stacked": (noise(0, 2, 8, 8, 3), "<image> a <image>", 2),
    "nothing by prompt": ([[], []], ["a", "b"], 0),
}


@pytest.mark.parametrize(("images", "text", "number"), IMAGES.values(), ids=IMAGES)
def test_images_are_given_alone_in_a_list_or_by_prompt(images, text, number):
    output = make()(text=text, images=images, return_tensors="pt")
    assert len(output.get("pixel_values", [])) == number


def test_videos_are_told_from_lists_of_frames(tmp_path):
    clip = str(write_clip(tmp_path / "clip.mp4", 20))
    Image.fromarray(noise(0)).save(tmp_path / "frame.png")
    frame = str(tmp_path / "frame.png")
    frames = noise(1, 3, 8, 8, 3)
    for videos, text, number in (
        (clip, "<video>", 2),
        ([clip], "<video>", 2),
        ([[clip]], "<video>", 2),
        ([clip, frames], "<video><video>", 5),
        ([[clip], [frames]], ["<video>", "<video>"], 5),
        ([*frames], "<video>", 3),
        ([[*frames]], "<video>", 3),
        ([[*frames], [*frames]], ["<video>", "<video>"], 6),
        ([[[*frames]], [[*frames]]], ["<video>", "<video>"], 6),
        ([frame, frame], "<video>", 2),
        ([[frame, frame]], "<video>", 2),
        (iter(frames), "<video>", 3),
        (noise(2, 2, 3, 8, 8, 3), "<video><video>", 6),
    ):
        assert make()(text=text, videos=videos)["pixel_values"].shape[0] == number


def test_a_released_prompt_writes_image_for_a_video():
    output = make()(text="<image>\nWhat?", videos=[noise(0, 3, 8, 8, 3)], return_tensors="pt")
    assert num_image_tokens(output) == [6]


def test_media_without_a_source_are_given_apart():
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}]
    apart = tensors(make(), messages, images=[noise(0)])
    torch.testing.assert_close(apart["pixel_values"], tensors(make(), ask("q", noise(0)))["pixel_values"])


@pytest.mark.parametrize(
    ("text", "media", "words"),
    [
        ("<image>", {}, "1 places for images, but 0 images"),
        ("<image><image>", {"images": noise(0)}, "2 places for images, but 1 images"),
        ("no mark", {"images": [noise(0)]}, "0 places for images, but 1 images"),
        ("<video>", {"images": [noise(0)]}, "0 places for images, but 1 images"),
        ("<image>", {"images": [noise(0)], "videos": [noise(1, 2, 8, 8, 3)]}, "0 places for videos, but 1 videos"),
        (["<image>", "a"], {"images": [[], [noise(0)]]}, "Prompt 0 has 1 places for images, but 0 images"),
        (["<image>", "a"], {"images": [[noise(0)]]}, "1 lists of images were given for 2 prompts"),
        (None, {}, "A prompt is needed"),
        ([], {}, "at least one"),
        ([3], {}, "string or a list of strings"),
        ("<image>", {"images": ["missing.png"]}, "There is no file 'missing.png'"),
    ],
)
def test_images_that_do_not_match_are_refused(text, media, words):
    with pytest.raises(ValueError, match=words):
        make()(text=text, **media)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_frmes": 3}, "no option 'num_frmes'. The options are: padding"),
        ({"return_tensors": "np"}, "'pt' or None"),
        ({"padding": "yes"}, "padding is True"),
        ({"padding": "max_length"}, "needs max_length"),
        ({"padding_side": "top"}, "'left' or 'right'"),
        ({"truncation": True}, "truncation=True is not supported"),
        ({"tools": [{}]}, "tools"),
        ({"max_length": 5}, r"has \d+ tokens, more than max_length=5. Prompts are not cut"),
        ({"num_frames": 2, "fps": 2}, "exclude one another"),
        ({"processor_kwargs": {"do_resize": False}}, "no option 'do_resize'"),
    ],
)
def test_unknown_or_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        tensors(make(), ask("q"), **options)


def test_prompts_of_different_lengths_need_padding():
    with pytest.raises(ValueError, match="Give padding=True"):
        tensors(make(), [ask("a"), ask("a longer one")], padding=False)
    assert tensors(make(), ask("a"), padding="max_length", max_length=200)["input_ids"].shape == (1, 200)


@pytest.mark.parametrize("content", ["", "  \n", [{"type": "image", "image": noise(0)}]])
def test_a_question_without_words_is_refused(content):
    messages = [{"role": "user", "content": content}]
    for call in (lambda: tensors(make(), messages), lambda: make().stream(messages)):
        with pytest.raises(ValueError, match="The question is empty"):
            call()
    answered = [*messages, {"role": "assistant", "content": "A caption."}]
    assert tensors(make(), answered, add_generation_prompt=False)["answer_mask"].any()


def test_audio_is_refused():
    with pytest.raises(ValueError, match="does not hear"):
        make()(text="a", audio=[0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_token_id": 3}, "is an id of the tokenizer"),
        ({"image_mode": "anyres"}, "the modes are pad, center_crop, squash"),
        ({"frame_resize": "bilinear"}, "frame_resize is one of nearest, image_mode"),
    ],
)
def test_impossible_fields_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        make(**fields)


def test_the_limit_of_pixels_is_a_field():
    with pytest.raises(ValueError, match="more than the limit of 100"):
        tensors(make(max_pixels=100), ask("q", noise(0)))


def test_image_tokens_are_not_decoded():
    processor = make()
    text = processor.batch_decode(tensors(processor, ask("Hello?", noise(0)))["input_ids"], skip_special_tokens=True)
    assert text[0].split("user")[-1].split("assistant")[0].strip() == "Hello?"
