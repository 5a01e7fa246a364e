"""The processor: messages, pictures and videos become the tensors that the model reads.

Shapes: input_ids, attention_mask, answer_mask and labels are [B, T]; pixel_values is [F, V, 3, S, S]
with the frames of the whole batch in the order of their places in the prompts.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from json import JSONDecodeError
from pathlib import Path
from typing import Any, ClassVar, Self, cast, get_args

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from llava_mini.config import LlavaMiniConfig
from llava_mini.flow import ModelInputs
from llava_mini.processor import prompt as prompts
from llava_mini.processor.image import (
    CLIP_MEAN,
    CLIP_STD,
    MAX_PIXELS,
    ImageMode,
    ViewSettings,
    existing_file,
)
from llava_mini.processor.media_stream import FrameResize, MediaStream, ReadSettings
from llava_mini.processor.options import ProcessingOptions, read_options
from llava_mini.processor.prompt import TEMPLATES, Message, Prompt, Slot, load_template
from llava_mini.processor.published import read_published, require_tokenizer
from llava_mini.processor.slots import fill_slots
from llava_mini.processor.video import FrameSampling

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

FRAMES_PER_CHUNK = 8
"""Most frames of a stream that are in memory at a time."""


class LlavaMiniProcessor(ProcessorMixin):
    """Tokenizer, chat template and treatment of pictures, in one place."""

    image_token: ClassVar[str] = prompts.MARKS["image"]
    video_token: ClassVar[str] = prompts.MARKS["video"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        tokens_per_frame: int,
        image_size: int,
        resolution_ratio: int = 1,
        image_mode: ImageMode = "pad",
        frame_resize: FrameResize = "image_mode",
        num_begin_tokens: int = 1,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_pixels: int = MAX_PIXELS,
        chat_template: str | None = None,
    ) -> None:
        """Make a processor; ``from_config`` takes most of this from a model's configuration.

        Args:
            tokenizer: a fast tokenizer.
            image_token_id: the id at the places of vision tokens; not one of the tokenizer's.
            tokens_per_frame: Q.
            image_size: S, pixels per side that the vision tower reads.
            resolution_ratio: crops per side for HD.
            image_mode: how a picture is made square.
            frame_resize: how a frame of a video is made square.
            num_begin_tokens: begin-of-text tokens before a prompt; the released Llama model was run with 2.
            image_mean: of each colour channel, from 0 to 1.
            image_std: of each colour channel.
            max_pixels: most pixels of an image or of a frame.
            chat_template: in Jinja. None: the tokenizer's.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer. Load it with AutoTokenizer.")
        if image_token_id < len(tokenizer):
            raise ValueError(
                f"image_token_id {image_token_id} is an id of the tokenizer, which has {len(tokenizer)}. Take the "
                "size of the model's vocabulary."
            )
        if frame_resize not in get_args(FrameResize):
            raise ValueError(f"frame_resize is one of {', '.join(get_args(FrameResize))}; got {frame_resize!r}.")
        if not isinstance(num_begin_tokens, int) or num_begin_tokens < 0:
            raise ValueError(f"num_begin_tokens is a number of tokens, at least 0; got {num_begin_tokens!r}.")
        self.image_token_id = image_token_id
        self.tokens_per_frame = tokens_per_frame
        self.image_size = image_size
        self.resolution_ratio = resolution_ratio
        self.image_mode: ImageMode = image_mode
        self.frame_resize: FrameResize = frame_resize
        self.num_begin_tokens = num_begin_tokens
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.max_pixels = max_pixels
        self._views = ViewSettings(
            size=image_size, mode=image_mode, ratio=resolution_ratio, mean=tuple(image_mean), std=tuple(image_std)
        )
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_config(
        cls,
        config: LlavaMiniConfig,
        tokenizer: PreTrainedTokenizerBase,
        template: str = "llama_3_1",
        *,
        image_mode: ImageMode = "pad",
        frame_resize: FrameResize = "image_mode",
        num_begin_tokens: int = 1,
    ) -> Self:
        """A processor for the model that ``config`` describes.

        Args:
            config: the model's.
            tokenizer: the language model's.
            template: the name of a chat template, one of ``TEMPLATES``.
            image_mode: how a picture is made square; released weights: ``center_crop``.
            frame_resize: how a frame is made square; released weights: ``nearest``.
            num_begin_tokens: begin-of-text tokens before a prompt; released Llama weights: 2.
        """
        assert config.image_token_id is not None
        return cls(
            tokenizer,
            image_token_id=config.image_token_id,
            tokens_per_frame=config.tokens_per_frame,
            image_size=config.image_size,
            resolution_ratio=config.resolution_ratio,
            image_mode=image_mode,
            frame_resize=frame_resize,
            num_begin_tokens=num_begin_tokens,
            chat_template=load_template(template),
        )

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render one conversation, or a batch of them.

        Args:
            conversation: messages in the chat format of transformers, or a list of conversations.
            chat_template: another template than the processor's, in Jinja.
            add_generation_prompt: whether the header of an answer follows.
            continue_final_message: whether the last message goes on, without its end.
            tokenize: whether to return ids, and pixels, instead of text.
            return_dict: whether to return everything that the model reads instead of the ids alone.
            return_tensors: "pt" for tensors. None: lists, of different lengths unless padded.
            return_assistant_tokens_mask: whether to repeat ``answer_mask`` as ``assistant_masks``.
            processor_kwargs: the same as ``kwargs``, as newer versions of transformers pass them.
            kwargs: fields of ``ProcessingOptions``; ``images`` and ``videos`` for parts without a source.

        Returns:
            Text, or with ``tokenize`` input_ids, or with ``return_dict`` a ``BatchFeature``. Pixels are held for all
            frames, 1.35 MB each at 336 px; ``stream`` is for long videos.

        Raises:
            ValueError: an unknown role, part or option, missing content, an empty question, an image or
                video that cannot be read.
        """
        options, images, videos = read_options({**(processor_kwargs or {}), **kwargs})
        conversations, batched = _batch(conversation)
        checked = [prompts.check_messages(messages) for messages in conversations]
        template = self._template(chat_template)
        if add_generation_prompt:
            for messages in checked:
                prompts.require_question(messages)
        if not tokenize:
            texts = [
                prompts.render(
                    messages,
                    self.tokenizer,
                    template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                )[0]
                for messages in checked
            ]
            return texts if batched else texts[0]
        rendered = [
            prompts.encode_messages(
                messages,
                self.tokenizer,
                template,
                num_begin_tokens=self.num_begin_tokens,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
            for messages in checked
        ]
        slots = fill_slots([messages.slots for messages in checked], images, videos)
        output = self._assemble(rendered, slots, options, return_tensors)
        if return_assistant_tokens_mask:
            output["assistant_masks"] = output["answer_mask"]
        return output if return_dict else output["input_ids"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise finished prompts, in which ``<image>`` and ``<video>`` stand for media.

        Control tokens in the text count. What a user typed goes through ``apply_chat_template`` instead.

        Args:
            images: for the marks ``<image>``: one, a list for the whole batch, or a list for each prompt.
            text: one prompt or several.
            videos: for the marks ``<video>``, or, where there are no images, ``<image>``, as released prompts write it.
            audio: not supported.
            return_tensors: "pt" for tensors.
            add_special_tokens: whether the prompt gets ``num_begin_tokens`` begin-of-text tokens; those it starts with
                are counted.
            kwargs: fields of ``ProcessingOptions``.

        Raises:
            ValueError: images or videos do not match the marks, or cannot be read; an unknown option.
        """
        if audio is not None:
            raise ValueError("LLaVA-Mini does not hear: audio was given. Give images or videos.")
        if text is None:
            raise ValueError("A prompt is needed: give text with an <image> or <video> for each image or video.")
        options, *media = read_options({**kwargs, "images": images, "videos": videos})
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text is a string or a list of strings with at least one.")
        for one in texts:
            prompts.require_unicode(one)
        begin = self.num_begin_tokens if add_special_tokens else None
        rendered = [prompts.encode_text(one, self.tokenizer, num_begin_tokens=begin) for one in texts]
        slots = fill_slots([[Slot(kind=kind, source=None) for kind in one.kinds] for one in rendered], *media)
        return self._assemble(rendered, slots, options, return_tensors)

    def stream(
        self,
        messages: Sequence[Message],
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        all_frames: bool = False,
        max_frames: int | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        frames_per_chunk: int = FRAMES_PER_CHUNK,
        whole: bool = False,
    ) -> ModelInputs:
        """One conversation for the model, with frames decoded while they are asked for.

        Args:
            messages: in the chat format of transformers.
            num_frames: frames of each video, evenly spread.
            fps: frames per second of each video. By default one.
            all_frames: every frame of each video.
            max_frames: never more of one video than this.
            add_generation_prompt: whether the header of an answer follows.
            continue_final_message: whether the last message goes on, without its end.
            frames_per_chunk: most frames in memory at a time.
            whole: whether a video that is damaged anywhere is refused instead of seen as far as it goes.

        Returns:
            ``pixel_values`` is a ``MediaStream``, which gives ``FrameChunk``, or None for text alone.

        Raises:
            ValueError: as ``apply_chat_template``; what is wrong inside a file is raised while reading it.
        """
        sampling = FrameSampling(num_frames=num_frames, fps=fps, all_frames=all_frames, max_frames=max_frames)
        checked = prompts.check_messages(messages)
        if add_generation_prompt:
            prompts.require_question(checked)
        rendered = prompts.encode_messages(
            checked,
            self.tokenizer,
            self._template(None),
            num_begin_tokens=self.num_begin_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        slots = fill_slots([checked.slots], None, None)[0]
        for slot in slots:
            if isinstance(slot.source, str | Path) and not str(slot.source).startswith("data:"):
                existing_file(slot.source, slot.kind)
        ids = torch.tensor(_widened(rendered, [1] * len(slots), self.image_token_id).ids)[None]
        return ModelInputs(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            answer_mask=torch.tensor(rendered.answer_mask).long()[None],
            pixel_values=self._media(slots, sampling, frames_per_chunk, whole=whole) if slots else None,
        )

    def prompt_length(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> int:
        """Tokens of a conversation without those of its images and videos: their frames are not counted here."""
        rendered = prompts.encode_messages(
            prompts.check_messages(messages),
            self.tokenizer,
            self._template(None),
            num_begin_tokens=self.num_begin_tokens,
            add_generation_prompt=add_generation_prompt,
        )
        return len(rendered.ids) - sum(rendered.media_mask)

    @property
    def model_input_names(self) -> list[str]:
        """What the model reads."""
        return ["input_ids", "attention_mask", "answer_mask", "pixel_values"]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """Load a processor, or make the one of a released model, which comes without.

        Raises:
            ValueError: there is neither a processor nor a released model with its tokenizer.
        """
        hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
        if (published := read_published(pretrained_model_name_or_path, **hub)) is None:
            require_tokenizer(pretrained_model_name_or_path)
            try:
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            except JSONDecodeError as error:
                raise ValueError(
                    f"A JSON file of the processor in {str(pretrained_model_name_or_path)!r} is damaged ({error}). Was "
                    "its download interrupted?"
                ) from error
        config, tokenizer, settings = published
        return cls.from_config(config, tokenizer, **settings)

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Self:
        """Make a processor from what was saved.

        Raises:
            ValueError: the file has a key that a processor does not have.
        """
        known = {*cls.__init__.__code__.co_varnames, "processor_class", "auto_map"}
        if unknown := sorted(set(processor_dict) - known):
            raise ValueError(
                f"processor_config.json has the unknown keys {', '.join(unknown)}. Was it made for another model "
                "or by a newer version?"
            )
        return cast(Self, super().from_args_and_dict(args, processor_dict, **kwargs))

    def _template(self, template: str | None) -> str:
        chosen = template or self.chat_template
        if not isinstance(chosen, str):
            raise ValueError(f"The processor has no chat template. Make it with one of: {', '.join(TEMPLATES)}.")
        return chosen

    def _media(
        self, slots: Sequence[Slot], sampling: FrameSampling, frames_per_chunk: int, *, whole: bool = False
    ) -> MediaStream:
        settings = ReadSettings(
            views=self._views,
            frame_resize=self.frame_resize,
            sampling=sampling,
            max_pixels=self.max_pixels,
            whole=whole,
        )
        return MediaStream(slots, settings, frames_per_chunk)

    def _assemble(
        self,
        rendered: Sequence[Prompt],
        slots: Sequence[Sequence[Slot]],
        options: ProcessingOptions,
        return_tensors: str | None,
    ) -> BatchFeature:
        """Read all media and put the batch together."""
        media = [self._media(prompt_slots, options.sampling, FRAMES_PER_CHUNK) for prompt_slots in slots]
        read = [[list(stream.chunks(index)) for index in range(len(stream))] for stream in media]
        counts = [[sum(len(chunk.pixel_values) for chunk in medium) for medium in media] for media in read]
        wide = [
            _widened(one, [count * self.tokens_per_frame for count in frames], self.image_token_id)
            for one, frames in zip(rendered, counts, strict=True)
        ]
        data = self._pad([one.ids for one in wide], [one.answer_mask for one in wide], options, return_tensors)
        pixels = [chunk.pixel_values for media in read for medium in media for chunk in medium]
        if pixels:
            data["pixel_values"] = torch.cat(pixels)  # [F, V, 3, S, S]
        if options.return_metadata:
            data["video_metadata"] = [
                [
                    {"num_frames": count, "times": [time for chunk in medium for time in chunk.times]}
                    for slot, medium, count in zip(prompt_slots, media, frames, strict=True)
                    if slot.kind == "video"
                ]
                for prompt_slots, media, frames in zip(slots, read, counts, strict=True)
            ]
        return BatchFeature(data)

    def _pad(
        self,
        ids: Sequence[Sequence[int]],
        answers: Sequence[Sequence[bool]],
        options: ProcessingOptions,
        return_tensors: str | None,
    ) -> dict[str, Any]:
        if return_tensors not in (None, "pt"):
            raise ValueError(f"return_tensors is 'pt' or None, got {return_tensors!r}. The model reads torch tensors.")
        longest = max(len(row) for row in ids)
        padding = len(ids) > 1 and return_tensors == "pt" if options.padding is None else options.padding
        if options.max_length is not None and longest > options.max_length:
            raise ValueError(
                f"A prompt has {longest} tokens, more than max_length={options.max_length}. Prompts are not cut: "
                "shorten the text, or take fewer frames."
            )
        width = options.max_length if padding == "max_length" else longest if padding else None
        if return_tensors == "pt" and not padding and len({len(row) for row in ids}) > 1:
            raise ValueError("Prompts of different lengths do not make a tensor without padding. Give padding=True.")
        pad_id = self.tokenizer.pad_token_id
        pad_id = pad_id if pad_id is not None else self.tokenizer.eos_token_id or 0
        left = options.padding_side == "left"

        def padded(row: Sequence[int], value: int) -> list[int]:
            fill = [value] * max((width or 0) - len(row), 0)
            return [*fill, *row] if left else [*row, *fill]

        data = {
            "input_ids": [padded(row, pad_id) for row in ids],
            "attention_mask": [padded([1] * len(row), 0) for row in ids],
            "answer_mask": [padded([int(answer) for answer in row], 0) for row in answers],
        }
        if options.return_labels:
            labels = [
                [token if answer else -100 for token, answer in zip(row, answered, strict=True)]
                for row, answered in zip(ids, answers, strict=True)
            ]
            data["labels"] = [padded(row, -100) for row in labels]
        return {name: torch.tensor(rows) for name, rows in data.items()} if return_tensors == "pt" else dict(data)


def _batch(conversation: Any) -> tuple[list[Any], bool]:
    """Conversations, and whether several were given."""
    if isinstance(conversation, Sequence) and conversation and not isinstance(conversation[0], Mapping | str):
        return list(conversation), True
    return [conversation], False


def _widened(prompt: Prompt, counts: Sequence[int], image_token_id: int) -> Prompt:
    """The prompt with as many image tokens at each medium as it takes."""
    remaining = iter(counts)
    widths = [next(remaining) if medium else 1 for medium in prompt.media_mask]

    def widen(row: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(itertools.chain.from_iterable([value] * width for value, width in zip(row, widths, strict=True)))

    ids = [image_token_id if medium else token for token, medium in zip(prompt.ids, prompt.media_mask, strict=True)]
    return Prompt(
        ids=widen(ids), media_mask=widen(prompt.media_mask), answer_mask=widen(prompt.answer_mask), kinds=prompt.kinds
    )
