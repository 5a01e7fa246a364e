"""Plans: counted things equal the real ones, and work is close to what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llava_mini.config import preset
from llava_mini.data.tuning_batch import TuningBatch
from llava_mini.flow import ModelInputs
from llava_mini.model.cost import parameters
from llava_mini.training.checkpoints import state_of
from llava_mini.training.instruction import InstructionTask
from llava_mini.training.lora import LoraSettings, add_lora
from llava_mini.training.optimizer import MasterAdamW, OptimizerSettings
from llava_mini.training.plan import Devices, SampleSize, make_plan, training_flops
from llava_mini.training.stages import apply_stage
from llava_mini.training.tuning_stages import STAGE_1, STAGE_2, tuning_stage
from tests.tiny_models import batch, pixels, prompt, tiny_config, tiny_model

ONE_IMAGE = SampleSize(frames=1, text_tokens=256, supervised_tokens=128)
STAGE_1_FIELDS = {"reducer": "identity", "prefusion_num_layers": 0}


def plan(config, rates=STAGE_2, **options):
    options = {"devices": Devices(), "batch": 4, "sizes": [ONE_IMAGE], **options}
    return make_plan("a stage", config, rates, **options)


def test_parameters_are_those_of_the_configuration():
    config = preset("llava-mini-vicuna-7b")
    made = plan(config)
    assert {part.name: part.parameters for part in made.parts} == parameters(config).as_dict()
    trained = {part.name: part.trained for part in made.parts}
    assert trained["vision_tower"] == 0
    assert trained["language_model"] == parameters(config).language_model
    assert trained["reducer"] == parameters(config).reducer - config.tokens_per_frame * 1024  # the codes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_take_as_many_bytes_as_planned(dtype):
    model = tiny_model().to(dtype)
    stage = tuning_stage("a stage", [name for name, _ in model.named_parameters()], STAGE_2)
    optimizer = MasterAdamW(apply_stage(model.named_parameters(), stage), OptimizerSettings())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    gradients = dtype.itemsize * sum(parameter.numel() for parameter in trained)
    in_update = 4 * sum(parameter.numel() for parameter in trained if dtype != torch.float32)
    optimizer.step(1.0)
    kept = (*optimizer.masters, *optimizer.moments().values())
    states = sum(value.numel() * value.element_size() for value in kept)
    weights = sum(parameter.numel() * dtype.itemsize for parameter in trained if dtype != torch.float32)
    stored = state_of(model, optimizer).values()
    made = plan(tiny_config(), dtype=dtype)
    assert made.checkpoint_bytes == sum(value.numel() * value.element_size() for value in stored)
    memory = made.memory
    assert memory.trained == weights + gradients + in_update + states
    assert memory.frozen == dtype.itemsize * sum(one.numel() for one in model.parameters() if not one.requires_grad)


@pytest.mark.parametrize(
    ("fields", "rates", "lora"),
    [
        (STAGE_1_FIELDS, STAGE_1, None),
        ({}, STAGE_2, None),
        ({"reducer": "average_pool"}, STAGE_2, None),
        ({}, STAGE_2, LoraSettings(rank=1)),
        ({"reducer": "fastv", "prefusion_num_layers": 0, "reducer_tokens": 2}, STAGE_2, None),
    ],
    ids=["stage 1", "stage 2", "average pool", "low-rank", "fastv"],
)
def test_work_is_within_five_percent_of_what_torch_counts(fields, rates, lora):
    text = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 160, "head_dim": 16}
    model = tiny_model(text=text, **fields)
    model.set_attn_implementation("eager")  # whose products torch counts on the way back, too
    config = model.config
    words, supervised = 40, 10
    ids = prompt(config, [5] * 20, 2, [6] * 20)
    labels = torch.tensor([[-100] * (len(ids) - supervised) + ids[-supervised:]])
    inputs = ModelInputs(**batch([ids]), labels=labels, pixel_values=pixels(config, 2))
    if lora is not None:
        add_lora(model, lora)
    apply_stage(
        model.named_parameters(), tuning_stage("a stage", [name for name, _ in model.named_parameters()], rates)
    )
    task = InstructionTask(model.train(), lambda index: None)
    size = SampleSize(frames=2, text_tokens=words, supervised_tokens=supervised)
    with FlopCounterMode(display=False) as counter:
        task.losses(TuningBatch(inputs=inputs, ids=("a",))).total.backward()
    planned = training_flops(config, rates, size, checkpointing=False, lora=lora).total
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_checkpointing_runs_the_layers_that_train_once_more():
    config = preset("llava-mini-vicuna-7b")
    plain, again = (training_flops(config, STAGE_2, ONE_IMAGE, checkpointing=on) for on in (False, True))
    assert plain.vision_tower == again.vision_tower
    assert again.prefusion == pytest.approx(plain.prefusion * 4 / 3)
    assert 1.3 < again.language_model / plain.language_model < 4 / 3


def test_more_devices_hold_less_each_when_they_share():
    config = preset("llava-mini-vicuna-7b")
    one, eight, many = (
        plan(config, devices=Devices(number=number, strategy=strategy), batch=64).memory
        for number, strategy in ((1, "none"), (8, "fsdp"), (64, "fsdp"))
    )
    assert one.trained > 7 * eight.trained
    assert eight.trained == pytest.approx(8 * many.trained, rel=1e-6)
    assert eight.activations == many.activations


def test_low_rank_updates_and_four_bits_take_less():
    config = preset("llava-mini-vicuna-7b")
    full, low, four = (
        plan(config, lora=settings).memory.total
        for settings in (None, LoraSettings(prefusion=True), LoraSettings(prefusion=True, four_bit=True))
    )
    assert full > 3 * low
    assert low > four + 8e9  # 6.5 billion weights at half a byte instead of two


def test_the_text_tells_rates_steps_tokens_memory_and_work():
    made = plan(
        preset("llava-mini-llama-3.1-8b"),
        devices=Devices(number=8, strategy="fsdp", micro_batch=8),
        batch=256,
        num_samples=665_298,
        num_steps=5198,
    )
    text = str(made)
    assert "vision_tower           303,507,456                 0   frozen" in text
    assert "language_model       8,030,261,248     8,030,261,248   0.0001" in text
    assert "5,198 steps of 256 samples (8 x 4 on each device); 665,298 samples in an epoch" in text
    assert "257 a sample (assumed)" in text
    assert "a device: frozen weights" in text
    assert made.work_per_step == 256 * made.work_per_sample
    assert made.hours(100) == pytest.approx(5198 * made.work_per_step / 8e14 / 3600)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 6, "devices": Devices(micro_batch=4)}, "Choose a multiple of 4"),
        ({"sizes": []}, "needs the sizes of some samples"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        plan(tiny_config(), **options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"number": 2}, "need the strategy ddp"),
        ({"number": 0}, "at least 1 device"),
        ({"strategy": "zero"}, "none, ddp"),
    ],
)
def test_devices_that_cannot_be_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Devices(**fields)
