"""The model in the hands of transformers: Auto classes, pipeline, Trainer, PEFT."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, Trainer, TrainingArguments, pipeline
from trl import SFTConfig, SFTTrainer

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from tests.tiny_models import tiny_model

TOKENIZER = Path(__file__).parents[1] / "parity" / "fixtures" / "tokenizers" / "llama3_tiny"
GREEDY = {"max_new_tokens": 5, "do_sample": False}
SHORT_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "max_steps": 8,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Settings of transformers' trainer and TRL's."""


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def question(*media: dict[str, Any], text: str = "What is in the image?") -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def image(seed: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(seed)}


def video(seed: int, frames: int) -> dict[str, Any]:
    return {"type": "video", "video": [picture(seed + number) for number in range(frames)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model and its processor."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = "<|finetune_right_pad_id|>"
    model = tiny_model(
        text={"vocab_size": len(tokenizer), "eos_token_id": 521, "bos_token_id": 512, "pad_token_id": 516}
    )
    model.generation_config.pad_token_id = 516
    model.save_pretrained(path)
    LlavaMiniProcessor.from_config(model.config, tokenizer, template="llama_3_1").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LlavaMiniForConditionalGeneration:
    return LlavaMiniForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder: Path) -> LlavaMiniProcessor:
    return LlavaMiniProcessor.from_pretrained(folder)


def inputs_of(processor: LlavaMiniProcessor, conversations: Any, **kwargs: Any) -> Any:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(conversations, **{**options, **kwargs})


def test_auto_classes_give_ours(folder: Path):
    assert isinstance(AutoModelForImageTextToText.from_pretrained(folder), LlavaMiniForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(folder), LlavaMiniProcessor)


def test_saving_and_loading_keeps_every_logit(folder: Path, model: Any, processor: Any, tmp_path: Path):
    inputs = inputs_of(processor, question(image(0)))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    weights = again.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    # Kernels may depend on where in memory a weight lies, so the last bit of a sum is free.
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_a_batch_of_mixed_media_generates_what_its_conversations_do_alone(model: Any, processor: Any):
    conversations = [
        question(image(0)),
        question(video(1, 4), text="What happened?"),
        question(text="Who are you? <image> is only text here."),
        question(image(7), image(8), text="Compare."),
        [*question(image(3)), {"role": "assistant", "content": "A cat."}, *question(text="Where?")],
    ]
    together = inputs_of(processor, conversations, padding=True, all_frames=True)
    length = together["input_ids"].shape[1]
    answers = model.generate(**together, **GREEDY)[:, length:]
    for conversation, answer in zip(conversations, answers, strict=True):
        alone = inputs_of(processor, conversation, all_frames=True)
        expected = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        stop = (answer == 521).nonzero()
        end = int(stop[0]) + 1 if len(stop) else len(answer)
        assert answer[:end].tolist() == expected.tolist()


def test_a_streamed_video_answers_as_a_held_one(model: Any, processor: Any):
    conversation = question(video(1, 11), image(30), text="What happened?")
    held = inputs_of(processor, conversation, all_frames=True)
    streamed = processor.stream(conversation, all_frames=True, frames_per_chunk=4)
    fused = model.fuse(streamed)
    assert torch.equal(fused.input_ids, held["input_ids"])
    assert torch.equal(model.generate(fused=fused, **GREEDY), model.generate(**held, **GREEDY))


def test_the_pipeline_answers(model: Any, processor: Any):
    pipe: Any = pipeline("image-text-to-text", model=model, processor=processor)
    messages = question(image(0))
    (result,) = pipe(text=messages, generate_kwargs=GREEDY, return_full_text=False)
    inputs = inputs_of(processor, messages)
    expected = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert result["generated_text"] == processor.decode(expected, skip_special_tokens=True)


class Conversations(torch.utils.data.Dataset[Any]):
    """Four pictures with an answer each."""

    def __init__(self, processor: LlavaMiniProcessor) -> None:
        self.processor = processor

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [*question(image(index)), {"role": "assistant", "content": ["A cat.", "A dog."][index % 2]}]

    def collate(self, conversations: list[Any]) -> Any:
        options = {"add_generation_prompt": False, "padding": True, "padding_side": "right", "return_labels": True}
        return inputs_of(self.processor, conversations, **options)


def train(trainer: Trainer) -> list[float]:
    """The loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_transformers_trainer_lowers_the_loss(folder: Path, processor: Any, tmp_path: Path):
    model = LlavaMiniForConditionalGeneration.from_pretrained(folder)
    data = Conversations(processor)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        gradient_checkpointing=True,
        **SHORT_TRAINING,
    )
    losses = train(Trainer(model=model, args=arguments, train_dataset=data, data_collator=data.collate))
    assert losses[-1] < 0.7 * losses[0]


def test_trls_sft_trainer_lowers_the_loss(folder: Path, tmp_path: Path):
    answers = ["A cat.", "A dog."]
    rows = [
        {
            "images": [picture(index)],
            "messages": [
                {"role": "user", "content": "What is in the image?"},
                {"role": "assistant", "content": answers[index % 2]},
            ],
        }
        for index in range(4)
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        bf16=False,
        max_length=None,  # images are never cut in two
        assistant_only_loss=True,  # what has a label is not fused, so questions must have none
        **SHORT_TRAINING,
    )
    trainer = SFTTrainer(
        model=LlavaMiniForConditionalGeneration.from_pretrained(folder),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=LlavaMiniProcessor.from_pretrained(folder),
    )
    batch = trainer.data_collator([dict(row) for row in rows[:2]])
    assert torch.equal(batch["labels"] != -100, batch["answer_mask"].bool())
    losses = train(trainer)
    assert losses[-1] < 0.7 * losses[0]


def test_lora_by_peft_changes_only_what_it_targets(folder: Path, processor: Any, tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = LlavaMiniForConditionalGeneration.from_pretrained(folder)
    inputs = Conversations(processor).collate([Conversations(processor)[0]])
    config = LoraConfig(r=2, target_modules=r".*(language_model|prefusion).*\.(q_proj|v_proj)", init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    tuned(**inputs).loss.backward()
    reached = {name.split(".lora_")[0] for name, p in tuned.named_parameters() if p.grad is not None}
    assert len(reached) == 2 * (3 + 2)
    expected = tuned(**inputs).logits
    tuned.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(LlavaMiniForConditionalGeneration.from_pretrained(folder), tmp_path).eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    merged: Any = again.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
