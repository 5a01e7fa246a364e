"""What the two stages of the paper have in common: a model, data in the format of LLaVA, a plan, and a run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path

import torch
from transformers import CLIPVisionModel

from llava_mini.checkpoint.assemble import build_generation, build_model, build_processor, refit
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.source import Source
from llava_mini.config import LlavaMiniConfig
from llava_mini.data.features import FeatureKind, FeatureStore
from llava_mini.data.mixture import DataFile
from llava_mini.data.quarantine import Damaged
from llava_mini.data.samples import Sample
from llava_mini.data.streaming import StreamSettings
from llava_mini.data.tuning_batch import MAX_FRAMES, MAX_LENGTH, TuningCollator
from llava_mini.inference.memory import meta_model
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.prompt import check_messages, encode_messages, load_template
from llava_mini.recipes.run import Phase, Run
from llava_mini.recipes.tuning_data import FileData, StreamData, TuningData
from llava_mini.training.instruction import InstructionTask
from llava_mini.training.lora import LoraSettings, add_lora, four_bit_config, save_lora
from llava_mini.training.optimizer import OptimizerSettings
from llava_mini.training.plan import Devices, SampleSize, TrainingPlan, make_plan
from llava_mini.training.sharding import EngineSettings
from llava_mini.training.trainer import PhaseSettings, Task
from llava_mini.training.tuning_stages import Rates, tuning_stage
from llava_mini.training.world import World

SAMPLES_MEASURED = 200
"""Samples, evenly spread over the data, whose words are counted for a plan."""
ASSUMED = SampleSize(frames=1, text_tokens=256, supervised_tokens=128)
"""What a plan without data takes a sample to be."""
PLACES = "places"
"""Name of what a stream needs to go on, in the folder of its phase."""
LOG_EVERY = 10
ATTENTION = "sdpa"
"""The kernel that a run has unless its record names another."""
OPTIMIZER = OptimizerSettings(
    betas=(0.9, 0.999), weight_decay=0.0, max_gradient_norm=1.0, warmup_share=0.03, final_share=0.0
)
"""AdamW, cosine to zero, 3 % of warm-up: Table 9 and LLaVA-1.5."""


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """What is learned from, and how. The defaults are those of stage 2."""

    files: tuple[DataFile, ...] = ()
    """With neither files nor a stream, only a plan can be made."""
    stream: StreamSettings | None = None
    """Instead of files: shards that are read while training goes on, in the order of its own seed. It needs ``steps``,
    for nobody knows how many records there are."""
    rates: Rates = field(default_factory=Rates)
    batch: int = 256
    """Samples of a step, on all devices together."""
    micro_batch: int = 8
    """Samples that go through a device together; the steps do not depend on it, but for the order of samples."""
    epochs: float = 2.0
    steps: int | None = None
    """Instead of epochs."""
    captions: bool = False
    """Leave the questions out, as stage 1 does."""
    template: str | None = None
    """Name of the chat template. None: that of the model, see ``build_processor``."""
    max_length: int = MAX_LENGTH
    """Most tokens of a prompt, those of frames included, and never more than the context; longer ones are cut, see
    ``TuningCollator``."""
    num_frames: int | None = None
    """Frames of each video, evenly spread. None: so many per second."""
    fps: float | None = None
    """Frames of a video per second. None: one."""
    max_frames: int = MAX_FRAMES
    """Most frames of a video."""
    features: Path | None = None
    """Folder that ``llava-mini data features`` made, with what the vision tower says of all images. None: it is run."""
    lora: LoraSettings | None = None
    """Low-rank updates instead of full training of the language model."""
    max_damaged_share: float = 0.01
    """Largest share of samples that may be left out because they cannot be read."""
    checkpoint_minutes: float = 20.0
    """Between two checkpoints: 12 bytes for each parameter that trains, 100 GB for all of an 8B model."""
    keep_last: int = 2
    """How many checkpoints stay."""
    dtype: torch.dtype = torch.bfloat16
    """Of the arithmetic; weights that train have float32 copies."""
    optimizer: OptimizerSettings = OPTIMIZER
    seed: int = 0
    """Of the order of samples, and of all that is drawn."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batch < 1 or self.batch % self.micro_batch:
            raise ValueError(
                f"A batch of {self.batch} samples cannot be divided into micro-batches of {self.micro_batch}. Choose a "
                "micro_batch that divides it."
            )
        if not self.epochs > 0 or (self.steps is not None and self.steps < 1):
            raise ValueError(f"A training needs epochs above 0 or at least 1 step, got {self.epochs} and {self.steps}.")
        if self.stream is None:
            return
        if self.steps is None:
            raise ValueError(
                "A stream does not tell how many records it holds, so its epochs cannot be counted. Give the number of "
                "steps."
            )
        if self.files or self.features is not None:
            raise ValueError(
                "A stream came with files or with kept features. Files are for a run of their own, and kept features "
                "for micro-batches of one kind, which those of a stream are not. Leave them out."
            )

    @property
    def has_data(self) -> bool:
        """Whether there is anything to learn from."""
        return bool(self.files) or self.stream is not None

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, on all devices together."""
        return self.batch // self.micro_batch


@dataclass(frozen=True)
class Tuning:
    """A stage with its model: asked for its plan, or run."""

    name: str
    model: str
    """The model that it starts from, in words."""
    settings: TuningSettings
    config: LlavaMiniConfig
    """Of the model that trains."""
    source: Callable[[], Source]
    """Finds the model that trains; its weights stay on disk."""

    def plan(self, devices: Devices) -> TrainingPlan:
        """Return what the stage takes on some devices, which need not be there.

        Raises:
            ValueError: The batch cannot be divided among them, or the data cannot be read.
        """
        settings = self.settings
        sizes = self._sizes() if settings.has_data else [ASSUMED]
        return make_plan(
            f"{self.name} of {self.model}",
            self.config,
            settings.rates,
            devices=replace(devices, micro_batch=settings.micro_batch),
            batch=settings.batch,
            sizes=sizes,
            num_samples=self.data.num_samples if settings.has_data else None,
            num_steps=self.num_steps if settings.has_data else settings.steps,
            measured_on=len(sizes) if settings.has_data else 0,
            lora=settings.lora,
            dtype=settings.dtype,
        )

    def run(self, output: Path, *, engine: EngineSettings | None = None, world: World | None = None) -> Run:
        """Return the complete run, not yet started.

        Args:
            output: Folder of the run; the model will be in ``model``, low-rank updates in ``adapter`` too.
            engine: How it is computed. None: plainly.
            world: The processes that will run it. None: one.

        Raises:
            ValueError: There is no data, or a step cannot be divided among the processes.
        """
        settings, size = self.settings, 1 if world is None else world.size
        if settings.micro_batches % size:
            raise ValueError(
                f"The {settings.micro_batches} micro-batches of a step cannot be divided among {size} processes. "
                f"Choose a batch that is a multiple of {size * settings.micro_batch}."
            )
        engine = engine or EngineSettings()
        names = _parameter_names(self.config, settings.lora)
        return Run(
            name=self.name,
            settings=self._facts(engine),
            dtype=settings.dtype,
            output_dir=output,
            save=self._save,
            phases=(
                Phase(
                    settings=PhaseSettings(
                        name=self.name,
                        num_steps=self.num_steps,
                        stage=tuning_stage(self.name, names, settings.rates),
                        optimizer=settings.optimizer,
                        accumulate=settings.micro_batches // size,
                        engine=engine,
                        checkpoint_seconds=60 * settings.checkpoint_minutes,
                        max_damaged_share=settings.max_damaged_share,
                        keep_last=settings.keep_last,
                        log_every=LOG_EVERY,
                    ),
                    purpose=f"from {self.model}, on {self.data.in_words}",
                    build=partial(self.task, is_spread=size > 1, places=output / self.name / PLACES),
                ),
            ),
        )

    @cached_property
    def data(self) -> TuningData:
        """What it learns from."""
        settings = self.settings
        if settings.stream is not None:
            return StreamData(
                stream=settings.stream, batch_size=settings.micro_batch, micro_batches=settings.micro_batches
            )
        return FileData(
            files=settings.files,
            batch_size=settings.micro_batch,
            micro_batches=settings.micro_batches,
            seed=settings.seed,
        )

    @property
    def num_steps(self) -> int:
        """Of the whole stage."""
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        assert self.data.num_batches is not None, "The settings of a stream tell its steps."
        return max(ceil(settings.epochs * self.data.num_batches / settings.micro_batches), 1)

    @cached_property
    def processor(self) -> LlavaMiniProcessor:
        """What the trained model is saved with."""
        return build_processor(self.source(), self.settings.template)

    @property
    def collator(self) -> TuningCollator:
        """From samples to tensors."""
        return self._collator(None)

    def _collator(self, tower: CLIPVisionModel | None) -> TuningCollator:
        settings, processor = self.settings, self.processor
        features = None
        if tower is not None and settings.features is not None:
            features = FeatureStore(settings.features, FeatureKind.of(tower, processor))
        return TuningCollator(
            refit(processor, self.config, load_template("plain")) if settings.captions else processor,
            num_frames=settings.num_frames,
            fps=settings.fps,
            max_frames=settings.max_frames,
            max_length=min(settings.max_length, self.config.text.max_position_embeddings),
            captions=settings.captions,
            features=features,
        )

    def task(self, *, is_spread: bool = False, places: Path | None = None) -> InstructionTask:
        """Return the model with its data, ready to train.

        Args:
            is_spread: Whether several processes train.
            places: As in ``TuningData.batches``.
        """
        source = self.source()
        torch.manual_seed(self.settings.seed)
        model = self._four_bit(source) if self._is_four_bit else build_model(source, self.settings.dtype)
        model.generation_config = build_generation(source, self.processor)
        if self.settings.lora is not None:
            add_lora(model, self.settings.lora)
        batches = self.data.batches(self._collator(model.vision_tower), places)
        return InstructionTask(model, batches, is_spread=is_spread, has_features=self.settings.features is not None)

    @property
    def _is_four_bit(self) -> bool:
        return self.settings.lora is not None and self.settings.lora.four_bit

    def _four_bit(self, source: Source) -> LlavaMiniForConditionalGeneration:
        if source.layout != "ours" or LlavaMiniConfig.from_dict(source.published).reducer != self.config.reducer:
            raise ValueError(
                "4-bit training starts from a LLaVA-Mini in this project's layout. Make one first: llava-mini convert "
                "SRC DST, with --reducer query --prefusion-layers 4 if it is a LLaVA-1.5."
            )
        if not torch.cuda.is_available():
            raise ValueError("4-bit training needs a GPU, and there is none here. Leave --four-bit out.")
        place = torch.device("cuda", torch.cuda.current_device())
        return LlavaMiniForConditionalGeneration.from_pretrained(
            source.folder, dtype=self.settings.dtype, quantization_config=four_bit_config(), device_map={"": place}
        )

    def _save(self, task: Task, folder: Path) -> None:
        """Save the trained model; with low-rank updates, these alone and merged into the model."""
        assert isinstance(task, InstructionTask)
        model, lora = task.module, self.settings.lora
        if lora is None:
            model.save_pretrained(folder)
        else:
            base = self.source().folder
            assert base is not None
            adapter = folder.with_name("adapter")
            save_lora(model, lora, adapter, str(base), model.state_dict())
            if not folder.exists():  # a run that was cut off here is asked again
                convert(adapter, folder, base=base)
            assert model.generation_config is not None
            model.generation_config.save_pretrained(folder)
            self.processor.save_pretrained(adapter)
        self.processor.save_pretrained(folder)

    def _sizes(self) -> list[SampleSize]:
        collator, sizes, refused = self.collator, [], []
        for sample in self.data.some(SAMPLES_MEASURED):
            if isinstance(sample, Damaged):  # training leaves it out and tells
                refused.append(sample.reason)
                continue
            try:
                sizes.append(sample_size(sample, collator, self.settings))
            except ValueError as error:  # likewise
                refused.append(str(error))
        if not sizes:
            reason = refused[0] if refused else "There are none: are the shards empty?"
            raise ValueError(f"None of the {len(refused)} samples that were looked at can be learned. {reason}")
        return sizes

    def _facts(self, engine: EngineSettings) -> dict[str, object]:
        """Everything that decides what comes out."""
        settings = self.settings
        kernel = {} if engine.attention in (None, ATTENTION) else {"attention": engine.attention}
        special = ("files", "stream", "dtype", "lora", "rates", "optimizer", "features")
        harmless = ("checkpoint_minutes", "keep_last", "max_damaged_share")  # whoever is told to raise it goes on
        return {
            **{name: value for name, value in vars(settings).items() if name not in (*special, *harmless)},
            **self.data.facts,
            "rates": asdict(settings.rates),
            "optimizer": asdict(settings.optimizer),
            "model": self.model,
            "config": json.loads(self.config.to_json_string(use_diff=False)),
            "features": None if settings.features is None else str(settings.features),
            "lora": None if settings.lora is None else asdict(settings.lora),
            "dtype": str(settings.dtype),
            **kernel,
        }


def sample_size(sample: Sample, collator: TuningCollator, settings: TuningSettings) -> SampleSize:
    """Return how large a sample is. A film counts with the most frames that it may have: it is not opened."""
    processor = collator.processor
    assert isinstance(processor.chat_template, str)
    prompt = encode_messages(
        check_messages((sample.captioned() if collator.captions else sample).conversation()),
        processor.tokenizer,
        processor.chat_template,
        num_begin_tokens=processor.num_begin_tokens,
        add_generation_prompt=False,
    )
    films = sum(kind == "video" for kind in prompt.kinds)
    frames = len(prompt.kinds) - films + films * (settings.num_frames or settings.max_frames)
    words = min(len(prompt.ids) - len(prompt.kinds), settings.max_length)
    return SampleSize(
        frames=frames, text_tokens=max(words, 1), supervised_tokens=min(sum(prompt.answer_mask), max(words, 1))
    )


def _parameter_names(config: LlavaMiniConfig, lora: LoraSettings | None) -> list[str]:
    model = meta_model(config)
    if lora is not None:
        add_lora(model, lora)
    return [name for name, _ in model.named_parameters()]
