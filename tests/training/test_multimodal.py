import torch

from llava_mini.config import LlavaMiniConfig, preset
from llava_mini.data.collate import Collator
from llava_mini.data.synthetic.scenes import CHARACTERS, WORDS, SceneSettings
from llava_mini.data.synthetic.world import WorldSettings, world_item, world_record
from llava_mini.data.tokenizer import build_tokenizer
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.training.multimodal import Alignment, InstructionTuning, TunedModel, embedding_table

WORLD = WorldSettings(min_turns=4, max_turns=4, clip_share=0.5)
TEXTS = [text for i in range(200) for t in world_item("train", i, WORLD).turns for text in (t.question, f" {t.answer}")]
TOKENIZER = build_tokenizer(TEXTS, vocab_size=700)


def model(**fields):
    torch.manual_seed(0)
    tiny = preset("tiny")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    config = LlavaMiniConfig(
        vision_config={**tiny.vision.to_dict(), **small, "num_hidden_layers": 2},
        text_config={**tiny.text.to_dict(), **small, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16},
        **{"prefusion_num_layers": 1, **fields},
    )
    return LlavaMiniForConditionalGeneration(config)


def tuning(module, thing_weight=1.0):
    config = module.config
    processor = LlavaMiniProcessor.from_config(config, TOKENIZER, "tiny")
    collator = Collator(processor, image_token_id=config.image_token_id, tokens_per_frame=config.tokens_per_frame)
    return InstructionTuning(
        TunedModel(module),
        collator,
        lambda step: [world_record("train", index, WORLD) for index in range(4 * step, 4 * step + 4)],
        thing_weight=thing_weight,
        conversation_every=2,
    )


def test_without_losses_on_things_the_loss_of_a_conversation_is_the_models_own():
    task = tuning(model(), thing_weight=0.0)
    inputs = task.make_batch(0).inputs
    expected = task.module.model(**vars(inputs)).loss
    torch.testing.assert_close(task.losses(task.make_batch(0)).total, expected)


def test_every_part_but_the_unused_layer_gets_a_gradient():
    task = tuning(model())
    for parameter in task.module.model.vision_tower.parameters():
        parameter.requires_grad_(False)
    (task.losses(task.make_batch(0)).total + task.losses(task.make_batch(1)).total).backward()
    trained = {name for name, parameter in task.module.named_parameters() if parameter.grad is not None}
    for part in ("model.projector", "model.reducer", "model.prefusion", "model.language_model", "thing_heads"):
        assert any(name.startswith(part) for name in trained), part
    assert not any(name.startswith("model.vision_tower") for name in trained)


def test_questions_of_a_record_are_prompts_of_their_own_but_for_conversations():
    task = tuning(model())
    conversations, separate = task.make_batch(0), task.make_batch(1)
    assert conversations.inputs.input_ids.shape[0] == 4
    assert separate.inputs.input_ids.shape[0] > 4


def test_alignment_brings_patches_to_their_words():
    module = model(reducer="identity", prefusion_num_layers=0)
    with torch.no_grad():
        embedding_table(module).mul_(20)
    task = Alignment(module, TOKENIZER, batch_size=2, settings=SceneSettings(sign_share=0.0))
    optimizer = torch.optim.Adam(module.projector.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = task.losses(task.make_batch(0)).total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_order_of_letters_decides_where_the_patches_of_a_number_should_lie():
    task = Alignment(model(), TOKENIZER, batch_size=2, settings=SceneSettings())
    words = task.make_batch.words
    four, seven = 1 + CHARACTERS.index("4"), 1 + CHARACTERS.index("7")
    forwards = words["letter 1"][four] + words["letter 2"][seven]
    backwards = words["letter 1"][seven] + words["letter 2"][four]
    assert not torch.allclose(forwards, backwards)
    torch.testing.assert_close(words["letter 2"].norm(dim=-1), words["character"].norm(dim=-1))
    assert words["word"].shape == (1 + len(WORDS), 32)


def test_patches_of_a_thing_know_its_centre():
    batches = Alignment(model(), TOKENIZER, batch_size=2, settings=SceneSettings()).make_batch
    columns, rows = batches.words["column"], batches.words["row"]
    assert columns.shape == rows.shape == (13, 32)
    assert columns[0].norm() == rows[0].norm() == 0
    centres = (columns[1:, None] + rows[1:]).flatten(0, 1)  # [144, D]
    assert torch.cdist(centres, centres).fill_diagonal_(100).min() > 0.05 * columns[1].norm()
