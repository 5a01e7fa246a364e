"""Learned weights of frames: what they start as, and what they tell apart."""

import torch

from llava_mini.flow import ModelInputs
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.model.splice import places_in_prompts
from tests.tiny_models import pixels, prompt, tiny_config, tiny_model


def text_of(model, frames, order=None):
    """Fused text of a film in some order."""
    ids = torch.tensor([prompt(model.config, [5, 6], len(frames), [7, 8])])
    with torch.inference_mode():
        fused = model.fuse(ModelInputs(input_ids=ids, pixel_values=frames if order is None else frames[order]))
    return fused.inputs_embeds[fused.is_fused]


def test_frames_count_alike_before_training():
    torch.manual_seed(0)
    model = LlavaMiniForConditionalGeneration(tiny_config(frame_weights="by_place")).eval()
    plain = tiny_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    film = pixels(model.config, 4)
    assert torch.equal(text_of(model, film), text_of(plain, film))


def test_an_image_is_as_without_weights():
    model, plain = tiny_model(frame_weights="by_place"), tiny_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    image = pixels(model.config, 1)
    assert torch.equal(text_of(model, image), text_of(plain, image))


def test_text_about_a_film_and_the_film_backwards_differs_with_weights_only():
    model, plain = tiny_model(frame_weights="by_place"), tiny_model()
    film, backwards = pixels(model.config, 4), [3, 2, 1, 0]
    torch.testing.assert_close(text_of(plain, film), text_of(plain, film, backwards), atol=1e-5, rtol=1e-5)
    assert (text_of(model, film) - text_of(model, film, backwards)).abs().mean() > 0.1


def test_places_are_counted_in_each_prompt():
    assert places_in_prompts(torch.tensor([1, 0, 3, 2])).tolist() == [0, 0, 1, 2, 0, 1]


def test_weights_are_saved_and_loaded(tmp_path):
    model = tiny_model(frame_weights="by_place")
    model.save_pretrained(tmp_path)
    again = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path)
    film = pixels(model.config, 3)
    assert torch.equal(text_of(model, film), text_of(again, film))
