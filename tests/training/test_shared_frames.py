import torch

from llava_mini.flow import ModelInputs
from llava_mini.training.shared_frames import fuse_shared
from tests.tiny_models import IMAGE_TOKEN, pixels, tiny_model


def inputs_of(pixel_values):
    """Two questions about an image, then two about a clip of two frames, padded on the right; labels at the end."""
    i = IMAGE_TOKEN
    rows = [[5, i, 6, 7, 8, 9], [5, i, 9, 8, 3, 3], [5, i, i, 6, 10, 11], [5, i, i, 12, 11, 3]]
    ids = torch.tensor(rows)
    mask = (ids != 3).long()
    labels = torch.full_like(ids, -100)
    labels[:, 4] = torch.where(mask[:, 4] == 1, ids[:, 4], -100)
    return ModelInputs(input_ids=ids, attention_mask=mask, pixel_values=pixel_values, labels=labels)


def test_shared_frames_give_what_repeated_frames_give_and_the_same_gradients():
    model = tiny_model()
    image, clip = pixels(model.config, 1, seed=1), pixels(model.config, 2, seed=2)
    results = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            sources = torch.tensor([0, 0, 1, 2, 1, 2])
            fused = fuse_shared(model, inputs_of(torch.cat([image, clip])), sources)
        else:
            fused = model.fuse(inputs_of(torch.cat([image, image, clip, clip])))
        fused.inputs_embeds.square().sum().backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        results.append((fused, gradients))
    (plain, plain_gradients), (shared_prompt, shared_gradients) = results
    torch.testing.assert_close(shared_prompt.inputs_embeds, plain.inputs_embeds)
    assert shared_prompt.num_frames == plain.num_frames == (1, 1, 2, 2)
    assert plain_gradients.keys() == shared_gradients.keys()
    assert any(name.startswith("prefusion") for name in plain_gradients)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, rtol=1e-4, atol=1e-4)
