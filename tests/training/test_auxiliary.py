import torch

from llava_mini.data.changes import CHANGES
from llava_mini.data.collate import ClipNouns, FrameChanges, FrameThings, NounTokens, ShownThings
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
    facts = {"colour": none, "shape": none}
    assert module.shown_loss(embeds, ShownThings(prompts=none, tokens=none.view(0, 1), frames=none, facts=facts)) == 0
    nothing_new = FrameChanges(prompts=none, tokens=none.view(0, 1), facts=dict.fromkeys(CHANGES, none))
    assert module.change_loss(embeds, nothing_new) == 0
    assert module.clip_loss(embeds, ClipNouns(prompts=none, tokens=none, trajectories=torch.zeros(0, 6))) == 0


def test_the_trajectory_of_a_thing_is_learned_from_the_token_of_its_noun():
    module, hidden = heads(), torch.randn(2, 3, 8)
    trajectories = torch.tensor([[0.1, 0.5, 0.9, 0.5, 0.0, 1.0], [0.9, 0.2, 0.1, 0.2, 0.5, 1.0]])
    nouns = ClipNouns(prompts=torch.tensor([0, 1]), tokens=torch.tensor([2, 2]), trajectories=trajectories)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        loss = module.clip_loss(hidden, nouns)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert module.clip_loss(hidden.flip(0), nouns) > 1


def learned(loss_of, module, steps=80):
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss_of().detach())


def test_what_frames_show_is_learned_from_their_tokens():
    module, embeds = heads(), torch.randn(2, 3, 8)
    facts = {"colour": torch.tensor([0, 2, 1]), "shape": torch.tensor([1, 0, 1])}
    shown = ShownThings(
        prompts=torch.tensor([0, 1]), tokens=torch.tensor([[1], [1]]), frames=torch.tensor([0, 0, 1]), facts=facts
    )
    assert learned(lambda: module.shown_loss(embeds, shown), module) < 0.1
    assert module.shown_loss(embeds.flip(0), shown) > 1


def test_what_is_new_is_learned_from_the_tokens_of_frames():
    module, hidden = heads(), torch.randn(2, 3, 8)
    values = {"colour": torch.tensor([3, -100]), "shape": torch.tensor([0, 2]), "direction": torch.tensor([4, 1])}
    changes = FrameChanges(
        prompts=torch.tensor([0, 1]),
        tokens=torch.tensor([[1], [1]]),
        facts={name: values[fact] for name, fact in CHANGES.items()},
    )
    assert learned(lambda: module.change_loss(hidden, changes), module) < 0.1
    assert module.change_loss(hidden.flip(0), changes) > 1


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
