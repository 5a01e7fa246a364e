import torch

from llava_mini.data.collate import ClipNouns, FrameThings, NounTokens
from llava_mini.training.auxiliary import ThingHeads

NUM_VALUES = {"colour": 3, "shape": 2}


def heads():
    torch.manual_seed(0)
    return ThingHeads(8, NUM_VALUES)


def nouns(present=(1, 0)):
    count = len(present)
    known = [0 if one else -100 for one in present]
    return NounTokens(
        prompts=torch.zeros(count, dtype=torch.long),
        tokens=torch.arange(count),
        present=torch.tensor(present, dtype=torch.long),
        places=torch.full((count, 2), 0.5),
        facts={name: torch.tensor(known, dtype=torch.long) for name in NUM_VALUES},
    )


def test_the_noun_loss_can_be_learned_from_the_tokens():
    module, embeds = heads(), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = module.noun_loss(embeds, nouns())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_what_is_absent_has_neither_place_nor_properties():
    module, embeds = heads(), torch.randn(1, 4, 8, requires_grad=True)
    absent = nouns(present=(0,))
    moved = NounTokens(**{**vars(absent), "places": torch.ones(1, 2)})
    assert module.noun_loss(embeds, absent) == module.noun_loss(embeds, moved)


def test_batches_without_nouns_or_clips_have_a_loss_of_zero():
    module, embeds = heads(), torch.randn(1, 4, 8)
    none = torch.zeros(0, dtype=torch.long)
    things = FrameThings(
        prompts=none,
        tokens=none.view(0, 1),
        names=torch.zeros(0, 2, dtype=torch.long),
        present=none,
        places=torch.zeros(0, 2),
    )
    assert module.noun_loss(embeds, nouns(present=())) == 0
    assert module.frame_loss(embeds, torch.zeros(0, 8), things) == 0
    assert module.clip_loss(embeds, ClipNouns(prompts=none, tokens=none, trajectories=torch.zeros(0, 6))) == 0


def test_the_trajectory_of_a_thing_is_learned_from_the_token_of_its_noun():
    module, hidden = heads(), torch.randn(2, 3, 8)
    trajectories = torch.tensor([[0.1, 0.5, 0.9, 0.5, 0.0, 1.0], [0.9, 0.2, 0.1, 0.2, 0.5, 1.0]])
    nouns = ClipNouns(prompts=torch.tensor([0, 1]), tokens=torch.tensor([2, 1]), trajectories=trajectories)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        loss = module.clip_loss(hidden, nouns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert module.clip_loss(hidden.flip(0), nouns) > 1


def test_the_place_in_a_frame_depends_on_the_name():
    module, embeds = heads(), torch.zeros(1, 1, 8)
    zeros = torch.zeros(2, dtype=torch.long)
    places = torch.tensor([[0.1, 0.1], [0.9, 0.9]])
    names = torch.zeros(2, 2, dtype=torch.long)
    things = FrameThings(
        prompts=zeros, tokens=zeros[:, None], names=names, present=torch.ones_like(zeros), places=places
    )
    words = torch.eye(8)[:2]
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        loss = module.frame_loss(embeds, words, things)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2


def test_a_name_that_a_frame_does_not_show_has_no_place_there():
    module, embeds = heads(), torch.zeros(1, 1, 8)
    zeros, names = torch.zeros(2, dtype=torch.long), torch.zeros(2, 2, dtype=torch.long)
    losses = [
        module.frame_loss(
            embeds,
            torch.eye(8)[:2],
            FrameThings(
                prompts=zeros,
                tokens=zeros[:, None],
                names=names,
                present=torch.tensor([1, 0]),
                places=torch.tensor([[0.5, 0.5], place]),
            ),
        )
        for place in ([0.0, 0.0], [0.9, 0.9])
    ]
    assert losses[0] == losses[1] > 0
