"""The loss that asks the token of a frame for its patches."""

import torch

from llava_mini.flow import ModelInputs
from llava_mini.training.reconstruction import PatchDecoder, tokens_of_frames
from llava_mini.training.shared_frames import fuse_shared
from tests.tiny_models import IMAGE_TOKEN, batch, pixels, prompt, tiny_model


def test_each_frame_gets_the_token_that_stands_for_it():
    model = tiny_model(reducer_grid=2)
    tensors = batch([prompt(model.config, [5], 2, [7, 8]), prompt(model.config, [6], 1, [9]), [4, 4]])
    frames, sources = pixels(model.config, 3), torch.tensor([2, 0, 2])
    with torch.no_grad():
        fused = fuse_shared(model, ModelInputs(**tensors, pixel_values=frames), sources)
        seen = model.read(*model.reduce_frames(model.encode_frames(frames)), None).vision
    found, tokens = tokens_of_frames(fused, IMAGE_TOKEN, sources)
    assert seen is not None
    assert found.tolist() == [0, 2]
    torch.testing.assert_close(tokens, seen[[0, 2]], atol=2e-5, rtol=1e-4)


def test_the_loss_falls_only_where_tokens_differ_as_the_patches_do():
    torch.manual_seed(0)
    patches = torch.randn(8, 16, 24)
    told, blind = torch.randn(8, 1, 12), torch.zeros(8, 1, 12)
    losses = []
    for tokens in (told, blind):
        decoder = PatchDecoder(12, 24, side=4)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = decoder.loss(tokens, patches)
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] < 0.3
    assert losses[1] > 0.7


def test_patches_get_no_gradient():
    patches = torch.randn(2, 16, 24, requires_grad=True)
    tokens = torch.randn(2, 1, 12, requires_grad=True)
    PatchDecoder(12, 24, side=4).loss(tokens, patches).backward()
    assert patches.grad is None
    assert tokens.grad is not None
