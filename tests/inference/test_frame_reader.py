"""How frames get from the host to the device."""

import torch

from llava_mini.inference.frame_reader import _sent


def test_a_gpu_is_sent_frames_without_being_waited_for(monkeypatch):
    sent = []
    frames, pinned = torch.zeros(2), torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *to, **how: sent.append((tensor, to, how)) or tensor)
    cuda = torch.device("cuda")
    assert _sent(frames, cuda) is pinned  # only from there a copy goes by itself
    assert sent == [(pinned, (cuda,), {"non_blocking": True})]
    assert _sent(frames, torch.device("cpu")) is frames
