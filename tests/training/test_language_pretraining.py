import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig

from llava_mini.data.records import Turn
from llava_mini.data.synthetic.world import WorldSettings
from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.training.language_pretraining import LanguagePretraining, answer_loss, text_batch

TURNS = [
    Turn(question="What color is the circle?", answer="red", kind="colour", form="colour"),
    Turn(question="How many?", answer="2", kind="count", form="count"),
]
TOKENIZER = build_tokenizer(["a red circle", "What color is the circle? red How many?"] * 5, vocab_size=320)


def test_only_answers_and_their_end_have_labels():
    batch = text_batch(TOKENIZER, [("a red circle", TURNS), ("a", TURNS[:1])])
    labelled = batch.labels[0][batch.labels[0] != -100]
    assert TOKENIZER.decode(labelled) == "red<|end|>2<|end|>"
    assert batch.attention_mask[1].sum() < batch.attention_mask[0].sum()
    assert (batch.labels[1][batch.attention_mask[1] == 0] == -100).all()


def test_the_description_stands_in_the_first_question_only():
    batch = text_batch(TOKENIZER, [("a red circle", TURNS)])
    assert TOKENIZER.decode(batch.input_ids[0]).count("a red circle") == 1


def test_the_answer_loss_is_the_shifted_cross_entropy():
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 20), torch.randn(2, 6, 8)
    labels = torch.tensor([[-100, -100, 3, 4, -100, 5], [-100, 1, -100, -100, -100, -100]])
    expected = functional.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(answer_loss(head, hidden, labels).total, expected)


def test_the_loss_falls_on_a_batch_that_is_seen_again():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    task = LanguagePretraining(
        config, TOKENIZER, batch_size=4, dtype=torch.float32, settings=WorldSettings(max_turns=3)
    )
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        loss = task.losses(task.make_batch(0)).total
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2
