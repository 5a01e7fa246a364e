"""What the two stages of the paper have in common: a model, files in the format of LLaVA, a plan, and a run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPVisionModel

from llava_mini.checkpoint.assemble import build_generation, build_model, build_processor, refit
from llava_mini.checkpoint.convert import convert
from llava_mini.checkpoint.source import Source
from llava_mini.config import LlavaMiniConfig
from llava_mini.data.features import FeatureKind, FeatureStore
from llava_mini.data.mixture import DataFile, Mixture
from llava_mini.data.order import BatchOrder
from llava_mini.data.samples import Sample
from llava_mini.data.tuning_batch import MAX_FRAMES, TuningBatches, TuningCollator
from llava_mini.inference.memory import meta_model
from llava_mini.model.llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.processor.processor import LlavaMiniProcessor
from llava_mini.processor.prompt import check_messages, encode_messages, load_template
from llava_mini.recipes.run import Phase, Run
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
CHECKPOINTS_KEPT = 2
LOG_EVERY = 10
OPTIMIZER = OptimizerSettings(
    betas=(0.9, 0.999), weight_decay=0.0, max_gradient_norm=1.0, warmup_share=0.03, final_share=0.0
)
"""AdamW, cosine to zero, 3 % of warm-up: Table 9 and LLaVA-1.5."""


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """What is learned from, and how. The defaults are those of stage 2."""

    files: tuple[DataFile, ...] = ()
    """Empty: only a plan can be made."""
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
    max_length: int = 2048
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
    """Between two checkpoints: the states of an 8B model take 100 GB."""
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
        sizes = self._sizes() if settings.files else [ASSUMED]
        return make_plan(
            f"{self.name} of {self.model}",
            self.config,
            settings.rates,
            devices=replace(devices, micro_batch=settings.micro_batch),
            batch=settings.batch,
            sizes=sizes,
            num_samples=self.order.num_samples if settings.files else None,
            num_steps=self.num_steps if settings.files else settings.steps,
            measured_on=len(sizes) if settings.files else 0,
            lora=settings.lora,
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
        if settings.features is not None and size > 1 and engine is not None and engine.strategy == "fsdp":
            raise ValueError(
                "With kept features some processes would run the vision tower and others not, and fsdp waits for all "
                "of them. Choose the strategy ddp, or leave the features out."
            )
        names = _parameter_names(self.config, settings.lora)
        return Run(
            name=self.name,
            settings=self._facts(),
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
                        engine=engine or EngineSettings(),
                        checkpoint_seconds=60 * settings.checkpoint_minutes,
                        max_damaged_share=settings.max_damaged_share,
                        keep_last=CHECKPOINTS_KEPT,
                        log_every=LOG_EVERY,
                    ),
                    purpose=f"from {self.model}, on {self.order.num_samples} samples an epoch",
                    build=partial(self.task, is_spread=size > 1),
                ),
            ),
        )

    @cached_property
    def data(self) -> Mixture:
        """All records of the files."""
        return Mixture(self.settings.files)

    @cached_property
    def order(self) -> BatchOrder:
        """Which samples a micro-batch holds. Those of a step are of one kind, so that no device waits for another."""
        settings = self.settings
        return BatchOrder(self.data, batch_size=settings.micro_batch, seed=settings.seed, alike=settings.micro_batches)

    @property
    def num_steps(self) -> int:
        """Of the whole stage."""
        settings = self.settings
        return settings.steps or max(ceil(settings.epochs * self.order.num_batches / settings.micro_batches), 1)

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

    def task(self, *, is_spread: bool = False) -> InstructionTask:
        """Return the model with its data, ready to train.

        Args:
            is_spread: Whether several processes train.
        """
        source = self.source()
        torch.manual_seed(self.settings.seed)
        model = self._four_bit(source) if self._is_four_bit else build_model(source, self.settings.dtype)
        model.generation_config = build_generation(source, self.processor)
        if self.settings.lora is not None:
            add_lora(model, self.settings.lora)
        collator = self._collator(model.vision_tower)
        batches = TuningBatches(samples=self.data, order=self.order, collator=collator)
        return InstructionTask(model, batches, is_spread=is_spread)

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
        elif not folder.exists():  # a run that was cut off here is asked again
            base = self.source().folder
            assert base is not None
            adapter = folder.with_name("adapter")
            save_lora(model, lora, adapter, str(base), model.state_dict())
            convert(adapter, folder, base=base)
            assert model.generation_config is not None
            model.generation_config.save_pretrained(folder)
            self.processor.save_pretrained(adapter)
        self.processor.save_pretrained(folder)

    def _sizes(self) -> list[SampleSize]:
        chosen = np.unique(np.linspace(0, len(self.data) - 1, SAMPLES_MEASURED).round().astype(int))
        collator, sizes = self.collator, []
        refused: ValueError | None = None
        for index in chosen:
            try:
                sizes.append(sample_size(self.data[int(index)], collator, self.settings))
            except ValueError as error:  # of a malformed record, which training leaves out and tells
                refused = error
        if not sizes and refused is not None:
            raise ValueError(f"None of the {len(chosen)} samples that were looked at can be learned. {refused}")
        return sizes

    def _facts(self) -> dict[str, object]:
        """Everything that decides what comes out."""
        settings = self.settings
        special = ("files", "dtype", "lora", "rates", "optimizer", "features", "checkpoint_minutes")
        return {
            **{name: value for name, value in vars(settings).items() if name not in special},
            "rates": asdict(settings.rates),
            "optimizer": asdict(settings.optimizer),
            "model": self.model,
            "config": json.loads(self.config.to_json_string(use_diff=False)),
            "files": [str(file.path) for file in settings.files],
            "order": self.order.fingerprint,
            "features": None if settings.features is None else str(settings.features),
            "lora": None if settings.lora is None else asdict(settings.lora),
            "dtype": str(settings.dtype),
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


def data_files(
    paths: Sequence[Path], media: Sequence[Path] = (), weights: Sequence[float] = ()
) -> tuple[DataFile, ...]:
    """Return files with their folders and weights.

    Args:
        paths: Of JSON and JSONL files.
        media: One folder for all, or one for each. Empty: the folder of each file.
        weights: One for all, or one for each. Empty: 1.

    Raises:
        ValueError: There are neither one nor as many folders or weights as files, or a folder is missing.
    """
    for name, values in (("media folders", media), ("weights", weights)):
        if len(values) not in (0, 1, len(paths)):
            raise ValueError(
                f"{len(paths)} data files came with {len(values)} {name}. Give one for all of them, or one for each."
            )
    for folder in media:
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {str(folder)!r}. Give the folder where the paths in the records start."
            )

    def chosen(values: Sequence[Path] | Sequence[float], number: int) -> object:
        return values[number if len(values) > 1 else 0] if values else None

    return tuple(
        DataFile(
            path=path,
            media_folder=chosen(media, number),  # pyright: ignore[reportArgumentType]
            weight=1.0 if not weights else chosen(weights, number),  # pyright: ignore[reportArgumentType]
        )
        for number, path in enumerate(paths)
    )


def _parameter_names(config: LlavaMiniConfig, lora: LoraSettings | None) -> list[str]:
    model = meta_model(config)
    if lora is not None:
        add_lora(model, lora)
    return [name for name, _ in model.named_parameters()]
