"""Features of images on disk: the same bits, found by content, and never more than the disk holds."""

import io
import json
import pickle
from types import SimpleNamespace

import pytest
import torch

import llava_mini_cli
from llava_mini.data import features
from llava_mini.data.features import FeatureKind, FeatureStore, images_in, plan_features, write_features
from llava_mini.data.llava_format import sample_from_record
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.samples import MediaFile
from llava_mini.data.tuning_batch import TuningCollator
from llava_mini.flow import ModelInputs
from llava_mini.processor.processor import LlavaMiniProcessor
from tests.tiny_engine import BYTES, picture, save_tiny, tiny_parts, write_film
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture
def images(tmp_path):
    """Five different images, one of them twice."""
    folder = tmp_path / "images"
    folder.mkdir()
    for value in range(5):
        picture(value, (12, 10 + value)).save(folder / f"{value}.png")
    (folder / "again.png").write_bytes((folder / "0.png").read_bytes())
    return [MediaFile(kind="image", source=path) for path in sorted(folder.iterdir())]


def written(parts, images, folder, **settings):
    model, processor = parts
    kind = FeatureKind.of(model.vision_tower, processor)
    damaged = write_features(model.vision_tower, plan_features(images, folder, kind), **settings)
    return kind, damaged


def pixels_of(processor, image):
    message = {"role": "user", "content": [{"type": "image", "image": image.source}, {"type": "text", "text": "?"}]}
    return processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")[
        "pixel_values"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_bit_for_bit_what_the_model_computes(images, tmp_path, dtype):
    model, processor = tiny_parts()
    model.vision_tower.to(dtype)
    kind, damaged = written((model, processor), images, tmp_path / "features", images_per_pass=1)
    assert damaged == []
    store = FeatureStore(tmp_path / "features", kind)
    assert len(store) == 5
    for image in images:
        with torch.inference_mode():
            expected = model.encode_frames(pixels_of(processor, image))
        found = store.read(image)[None]
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert kind.num_bytes == found.numel() * found.element_size()


def test_crops_of_hd_images_are_kept_too(images, tmp_path):
    model = tiny_model(text={"vocab_size": BYTES}, resolution_ratio=2)
    processor = LlavaMiniProcessor.from_config(model.config, tiny_parts()[1].tokenizer, "tiny")
    kind, _ = written((model, processor), images[:1], tmp_path)
    with torch.inference_mode():
        expected = model.encode_frames(pixels_of(processor, images[0]))
    assert expected.shape[1] == 5
    assert torch.equal(FeatureStore(tmp_path, kind).read(images[0])[None], expected)


def test_an_image_at_full_size_costs_what_is_said():
    config = SimpleNamespace(image_size=336, patch_size=14, hidden_size=1024, to_dict=dict)
    tower = SimpleNamespace(config=config, dtype=torch.bfloat16, state_dict=dict)
    processor = SimpleNamespace(image_size=336, image_mode="pad", resolution_ratio=1, image_mean=(0,), image_std=(1,))
    assert FeatureKind.of(tower, processor).num_bytes == 1_179_648


def test_only_missing_images_are_computed_and_equal_files_once(parts, images, tmp_path, monkeypatch):
    model, processor = parts
    computed = []
    encode = features.encode_views
    monkeypatch.setattr(
        features, "encode_views", lambda tower, views: computed.append(len(views)) or encode(tower, views)
    )
    done = []
    written(parts, images[:3], tmp_path, images_per_file=2, images_per_pass=2, progress=done.append)
    assert (sum(computed), sum(done)) == (3, 3)
    kind = FeatureKind.of(model.vision_tower, processor)
    plan = plan_features([*images, *images], tmp_path, kind)
    assert (len(plan.missing), plan.num_present) == (2, 3)
    assert write_features(model.vision_tower, plan) == []
    assert sum(computed) == 5


def test_other_weights_pictures_or_formats_are_other_features(parts, images, tmp_path):
    model, processor = parts
    kind, _ = written(parts, images[:1], tmp_path)
    other_model, _ = tiny_parts(seed=1)
    squashed = LlavaMiniProcessor.from_config(model.config, processor.tokenizer, "tiny", image_mode="squash")
    half, _ = tiny_parts()
    half.vision_tower.to(torch.bfloat16)
    others = {
        "tower": FeatureKind.of(other_model.vision_tower, processor),
        "mode squash|mode pad": FeatureKind.of(model.vision_tower, squashed),
        "dtype float32 instead of bfloat16": FeatureKind.of(half.vision_tower, processor),
    }
    assert len({kind.fingerprint, *(other.fingerprint for other in others.values())}) == 4
    for word, other in others.items():
        with pytest.raises(ValueError, match=word):
            FeatureStore(tmp_path, other)
    assert FeatureKind.of(tiny_parts()[0].vision_tower, processor) == kind
    with pytest.raises(ValueError, match="There are no features in .*none'. Write them first"):
        FeatureStore(tmp_path / "none", kind)


def test_what_does_not_fit_on_the_disk_is_refused_before_it_begins(parts, images, tmp_path, monkeypatch):
    model, processor = parts
    kind = FeatureKind.of(model.vision_tower, processor)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5 * kind.num_bytes))
    plan = plan_features(images, tmp_path / "features", kind)
    told = f"5 images to compute at {kind.num_bytes / 1e6:.3g} MB each"
    assert told in str(plan)
    with pytest.raises(ValueError, match=f"do not fit on the disk: {told}"):
        write_features(model.vision_tower, plan)
    assert not list(tmp_path.glob("features/*/*"))


def test_a_full_disk_keeps_what_was_written_and_leaves_no_part(parts, images, tmp_path, monkeypatch):
    save, files = features.save_file, []

    def fill(tensors, path, metadata):
        files.append(path)
        path.write_bytes(b"part")
        if len(files) == 2:
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(features, "save_file", fill)
    with pytest.raises(OSError, match="No space left"):
        written(parts, images, tmp_path, images_per_file=2, images_per_pass=1)
    monkeypatch.setattr(features, "save_file", save)
    kind = FeatureKind.of(parts[0].vision_tower, parts[1])
    assert len(FeatureStore(tmp_path, kind)) == 2
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".part")]
    assert len(plan_features(images, tmp_path, kind).missing) == 3


def test_two_processes_that_write_the_same_images_do_not_take_each_others_files(parts, images, tmp_path, monkeypatch):
    save = features.save_file

    def save_while_another_writes(tensors, path, metadata):
        save(tensors, path, metadata)
        monkeypatch.setattr(features, "save_file", save)
        monkeypatch.setattr(features.os, "getpid", lambda: 1)
        written(parts, images, tmp_path)

    monkeypatch.setattr(features, "save_file", save_while_another_writes)
    kind, _ = written(parts, images, tmp_path)
    assert len(FeatureStore(tmp_path, kind)) == 5


def test_images_that_cannot_be_read_are_told_and_others_are_written(parts, images, tmp_path):
    images[1].source.write_bytes(images[1].source.read_bytes()[:60])
    images[2].source.unlink()
    kind, damaged = written(parts, images, tmp_path / "features")
    assert [one.media for one in damaged] == [str(images[2].source), str(images[1].source)]
    assert len(FeatureStore(tmp_path / "features", kind)) == 3


def test_a_changed_image_is_not_taken_for_the_old_one(parts, images, tmp_path):
    kind, _ = written(parts, images, tmp_path / "features")
    picture(99).save(images[0].source)
    with pytest.raises(ValueError, match="Was the image changed"):
        FeatureStore(tmp_path / "features", kind).read(images[0])


def test_a_damaged_file_is_named(parts, images, tmp_path):
    kind, _ = written(parts, images, tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name}.*is damaged"):
        FeatureStore(tmp_path, kind)


def test_a_store_keeps_few_files_open_and_can_be_sent_to_a_process(parts, images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_OPEN_FILES", 2)
    kind, _ = written(parts, images, tmp_path, images_per_file=1, images_per_pass=1)
    store = FeatureStore(tmp_path, kind)
    found = [store.read(image) for image in images]
    assert len(store._open) == 2
    sent = pickle.loads(pickle.dumps(store))
    assert all(torch.equal(sent.read(image), one) for image, one in zip(images, found, strict=True))


def sample(name, folder, *media, kind="image"):
    marks = f"<{kind}>" * len(media)
    turns = [{"from": "human", "value": f"{marks}what?"}, {"from": "gpt", "value": "yes"}]
    return sample_from_record({f"{kind}s": list(media), "conversations": turns}, name=name, media_folder=folder)


def test_a_batch_with_stored_features_is_fused_to_the_bits_of_one_with_pixels(parts, images, tmp_path):
    model, processor = parts
    folder = images[0].source.parent
    samples = [sample("a", folder, "0.png"), sample("b", folder, "1.png", "2.png"), sample("c", folder)]
    kind, _ = written(parts, (medium for one in samples for medium in one.media), tmp_path / "features")
    store = FeatureStore(tmp_path / "features", kind)
    plain = TuningCollator(processor)(samples)
    stored = TuningCollator(processor, features=store)(samples)
    assert (stored.inputs.pixel_values, plain.inputs.features) == (None, None)
    assert torch.equal(stored.inputs.input_ids, plain.inputs.input_ids)
    with torch.inference_mode():
        assert torch.equal(model.fuse(stored.inputs).inputs_embeds, model.fuse(plain.inputs).inputs_embeds)


def test_an_image_without_features_is_damaged_and_a_film_beside_features_is_refused(parts, images, tmp_path):
    _, processor = parts
    folder = images[0].source.parent
    write_film(folder / "film.mp4")
    kind, _ = written(parts, images[:1], tmp_path / "features")
    collator = TuningCollator(processor, features=FeatureStore(tmp_path / "features", kind))
    known, unknown = sample("known", folder, "0.png"), sample("unknown", folder, "3.png")
    batch = collator([known, unknown])
    assert (batch.ids, [one.id for one in batch.damaged]) == (("known",), ["unknown"])
    film = sample("film", folder, "film.mp4", kind="video")
    assert collator([film]).inputs.pixel_values is not None
    with pytest.raises(ValueError, match="Make batches of one kind"):
        collator([known, film])


def test_pixels_and_features_in_one_batch_are_refused(parts):
    model, _ = parts
    ids = torch.tensor([[model.config.image_token_id, 5]])
    pixels = torch.zeros(1, 1, 3, model.config.image_size, model.config.image_size)
    with pytest.raises(ValueError, match="pixel_values and features"):
        model.fuse(ModelInputs(input_ids=ids, pixel_values=pixels, features=model.encode_frames(pixels)))


def test_about_json_says_what_a_folder_holds(parts, images, tmp_path):
    kind, _ = written(parts, images[:1], tmp_path)
    about = json.loads((tmp_path / kind.fingerprint / "about.json").read_text())
    assert about["kind"]["mode"] == "pad"
    assert about["device"] == "cpu"


def test_encoded_bytes_and_their_file_share_features(parts, images, tmp_path):
    file = io.BytesIO()
    picture(7).save(file, format="PNG")
    (tmp_path / "seven.png").write_bytes(file.getvalue())
    kind, _ = written(parts, [MediaFile(kind="image", source=file.getvalue())], tmp_path / "features")
    assert (
        len(FeatureStore(tmp_path / "features", kind).read(MediaFile(kind="image", source=tmp_path / "seven.png"))) == 1
    )


def test_the_command_tells_the_cost_computes_what_is_missing_and_names_what_cannot_be_read(images, tmp_path, capsys):
    model, folder = save_tiny(tmp_path / "model"), images[0].source.parent
    write_film(folder / "film.mp4")
    media = [{"image": "0.png"}, {"images": ["1.png", "2.png"]}, {"video": "film.mp4"}, {"image": "film.mp4"}, {}]
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "yes"}]
    records = [{**one, "conversations": _marked(turns, one)} for one in media]
    (folder / "some.json").write_text(
        json.dumps([*records[:3], records[4], {"image": "3.png", "conversations": turns}])
    )
    (folder / "all.json").write_text(json.dumps(records))
    assert [medium.source.name for medium in images_in(Mixture([DataFile(path=folder / "some.json")]))] == [
        *("0.png", "1.png", "2.png")
    ]

    def run(name):
        arguments = ["data", "features", folder / name, "--output", tmp_path / "kept", "--model", model]
        return llava_mini_cli.main([*map(str, arguments), "--device", "cpu"]), capsys.readouterr().out

    code, told = run("some.json")
    assert code == 0
    assert told.startswith("3 images to compute at 0.00102 MB each: ")
    assert f"3 images are in {tmp_path / 'kept'}" in told
    code, told = run("all.json")
    assert code == 1
    assert told.startswith("1 images to compute")
    assert "not written: The file" in told
    assert "is a video, not an image" in told


def _marked(turns, media):
    marks = {"image": "<image>", "images": "<image><image>", "video": "<video>"}
    question = "".join(marks[key] for key in media) + turns[0]["value"]
    return [{**turns[0], "value": question}, turns[1]]
