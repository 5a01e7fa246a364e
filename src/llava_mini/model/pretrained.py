"""Strict loading and saving: every tensor of the model comes from the checkpoint, or loading fails.

transformers reports missing and unexpected tensors and goes on with random ones; here they are
errors. Only the vision tower may be absent as a whole: released configurations name it, and it is
then read from there.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self, cast

from safetensors import SafetensorError
from transformers import CLIPVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from llava_mini.config import LlavaMiniConfig, find_vision_tower

Misshapen = tuple[str, Collection[int], Collection[int]]
"""Name, shape in the checkpoint, shape in the model."""

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class StrictPreTrainedModel(PreTrainedModel):
    """A transformers model that refuses a checkpoint that is not exactly its own."""

    config: LlavaMiniConfig
    vision_tower: CLIPVisionModel
    _tower_is_absent = False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> Self:
        """Load our layout or the released one, with all arguments of transformers.

        Raises:
            ValueError: tensors are missing, unexpected or misshapen, a file of weights is damaged, or the vision
                tower is in neither the checkpoint nor the place that its configuration names.
        """
        try:
            output: Any = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights in {str(pretrained_model_name_or_path)!r} are damaged ({error}). Was their download "
                "interrupted? Fetch them again."
            ) from error
        model: Any = output[0] if isinstance(output, tuple) else output  # with output_loading_info
        if model._tower_is_absent:
            if pretrained_model_name_or_path is None:
                raise ValueError("The state dict holds no vision tower. Add its tensors, named vision_tower.*.")
            hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
            released, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
            hub.pop("subfolder", None)
            tower = read_vision_tower(
                released.get("mm_vision_tower", ""), Path(pretrained_model_name_or_path), model.config, **hub
            )
            model.vision_tower.load_state_dict(tower.state_dict())
            model._tower_is_absent = False
        return cast(Self, output)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save in our layout, whatever layout was loaded, with all arguments of transformers."""
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: LoadStateDictInfo) -> None:
        """Called by ``from_pretrained`` when it knows what did not fit and which of it is harmless."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        tower = {f"vision_tower.{name}" for name in self.vision_tower.state_dict()}
        missing = loading_info.missing_keys
        if tower <= missing:
            self._tower_is_absent = True
            missing = missing - tower
        error = describe_misfit(missing, loading_info.unexpected_keys, loading_info.mismatched_keys)
        # What is told here needs no report by transformers.
        loading_info.missing_keys, loading_info.unexpected_keys = set(), set()
        loading_info.mismatched_keys = set()
        if error:
            raise ValueError(f"The checkpoint {self.config.name_or_path!r} does not fit its configuration: {error}")


def describe_misfit(missing: Collection[str], unexpected: Collection[str], misshapen: Collection[Misshapen]) -> str:
    """Name the differences between a checkpoint and a model, the first ten of each kind; empty if there are none."""
    shapes = [f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in sorted(misshapen)]
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected), "of another shape": shapes}
    parts = [f"{kind}: {len(names)} ({_first(names)})" for kind, names in kinds.items() if names]
    if not parts:
        return ""
    return f"tensors {'; '.join(parts)}. Is the folder complete, and is config.json the one of these weights?"


def read_vision_tower(name: str, folder: Path, config: LlavaMiniConfig, **hub_arguments: Any) -> CLIPVisionModel:
    """The vision tower that a released configuration names.

    Args:
        name: ``mm_vision_tower``: a folder in the model's folder or beside it, or a name on the hub.
        folder: the model's folder.
        config: what the tower must fit.
        **hub_arguments: for a name on the hub, as in transformers.

    Raises:
        ValueError: it cannot be found, or does not fit.
    """
    path = find_vision_tower(name, folder)
    source = path if path is not None and path.is_dir() else name if path is None and "/" in name else None
    advice = "Put the CLIP model's folder beside the model's folder and name it in mm_vision_tower of config.json."
    if source is None:
        raise ValueError(f"The checkpoint {str(folder)!r} holds no vision tower and {name!r} is not one. {advice}")
    arguments = {} if isinstance(source, Path) else hub_arguments
    try:
        loaded: Any = CLIPVisionModel.from_pretrained(
            source, config=config.vision, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except OSError as error:
        raise ValueError(
            f"The checkpoint {str(folder)!r} holds no vision tower and the one it names, {name!r}, cannot be read "
            f"({str(error).splitlines()[0]}). {advice}"
        ) from error
    tower, info = loaded
    if misfit := describe_misfit(info["missing_keys"], (), info["mismatched_keys"]):
        raise ValueError(f"The vision tower {str(source)!r} does not fit the model {str(folder)!r}: {misfit}")
    return tower


def _first(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
