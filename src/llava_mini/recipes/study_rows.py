"""The rows of the study: what is compared, each as what it changes in the tiny model.

``LLaVA-Mini`` at toy scale is the tiny model's own configuration: query reduction to one token, three layers of
pre-fusion before a language model of four. Numbers of tables are those of the paper (arXiv 2501.03895).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llava_mini.config import LlavaMiniConfig, preset

DEPTH = preset("tiny").prefusion_num_layers
"""Layers of pre-fusion of the tiny model."""

BASE: dict[str, Any] = {
    "reducer": "query",
    "reducer_grid": 1,
    "prefusion_num_layers": DEPTH,
    "resolution_ratio": 1,
    "vision_tokens_from": "prefusion",
}
"""What a row has unless it says otherwise: LLaVA-Mini with one token."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the comparison. All rows see the same data and train for as many steps, at the same rates."""

    name: str
    """Also the name of its folder."""
    shows: str
    """One sentence for the docs."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration, in place of those of ``BASE``."""
    deeper_by: int = 0
    """Layers that stand before those of the language model, as copies of its first ones: as pre-fusion starts."""
    reducer_start: Literal["random", "vision"] = "random"
    """Whether the reducer goes on from the phase that trained the vision encoder; for the base reducer only."""
    prefusion_start: Literal["language_model", "random"] = "language_model"
    """Whether pre-fusion starts from the language model's first layers."""
    thing_weight: float = 0.0
    """Weight of the training-only losses on things, which favour pre-fusion. 0: answers alone are learned."""
    patch_weight: float = 0.0
    """Weight of the training-only loss that asks a frame's tokens for its patches, which needs no labels."""
    scored: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that change after training: methods that can be given any number of tokens then."""
    weights_of: str = ""
    """The row whose trained weights it takes as they are: a method without training. Empty: it is trained itself."""
    goes_on_from: str = ""
    """The row from whose trained weights it goes on. Empty: it begins where all rows do."""
    taught_by: str = ""
    """The row whose trained model teaches it what to answer, besides the answers. Empty: answers alone."""
    about_time: bool = False
    """Whether it learns, and is asked, nothing but ``TIME_KINDS`` of questions about clips."""

    def __post_init__(self) -> None:
        if (self.thing_weight or self.patch_weight) and self.changes.get("vision_tokens_from") == "nowhere":
            raise ValueError(f"The losses on things or patches of {self.name!r} look at vision tokens: it has none.")

    @property
    def needs(self) -> tuple[str, ...]:
        """Rows that have to be trained before."""
        return tuple(name for name in (self.weights_of, self.goes_on_from, self.taught_by) if name)

    def config(self, base: LlavaMiniConfig) -> LlavaMiniConfig:
        """Return the configuration of the row, with the sizes of another one."""
        fields = {**base.to_dict(), **BASE, **self.changes}
        layers = base.text.num_hidden_layers + self.deeper_by
        return LlavaMiniConfig.from_dict(
            {**fields, "text_config": {**base.text.to_dict(), "num_hidden_layers": layers}}
        )

    def full_size(self) -> LlavaMiniConfig:
        """Return the same method with CLIP ViT-L/14 at 336 px and Vicuna-7B, for counting its operations."""
        return replace(self, changes={**self.changes, **self.scored}).config(preset("llava-v1.5-7b"))


def _query(num_layers: int, grid: int = 1, **changes: Any) -> dict[str, Any]:
    return {"reducer_grid": grid, "prefusion_num_layers": num_layers, **changes}


def _pooled(num_layers: int, grid: int = 1, **changes: Any) -> dict[str, Any]:
    return {"reducer": "average_pool", **_query(num_layers, grid, **changes)}


def _method(reducer: str, **fields: Any) -> dict[str, Any]:
    return {"reducer": reducer, "prefusion_num_layers": 0, **fields}


def _all_tokens(num_layers: int) -> dict[str, Any]:
    return {"reducer": "identity", "prefusion_num_layers": num_layers}


METHODS = (
    Row(
        name="mqt-2-tokens",
        shows="MQT-LLaVA, trained with up to 64 tokens, here with two of them (Table 1).",
        changes=_method("mqt", reducer_tokens=64),
        scored={"reducer_tokens": 2},
    ),
    Row(
        name="m3-1-token",
        shows="M3: means of all scales in training, here of the whole picture (Table 1).",
        changes=_method("m3", reducer_grid=12),
        scored={"reducer_grid": 1},
    ),
    Row(
        name="token-packer-9-tokens",
        shows="TokenPacker with a sixteenth of the patches, as its 36 of 576 (Table 1).",
        changes=_method("token_packer", reducer_grid=3),
    ),
    Row(
        name="quecc-1-token",
        shows="QueCC: one token that knows the question.",
        changes=_method("quecc"),
    ),
    Row(
        name="llama-vid-2-tokens",
        shows="LLaMA-VID: a token for what is asked and the mean of the patches (Table 1).",
        changes=_method("llama_vid"),
    ),
    Row(
        name="voco-2-tokens",
        shows="VoCo-LLaMA: two rows of the language model that alone see the patches (Table 1).",
        changes=_method("voco", reducer_tokens=2),
    ),
    Row(
        name="query-inside-deep",
        shows="Compression and pre-fusion inside a language model as deep as pre-fusion and language model (Table 12).",
        changes=_method("query_inside", reducer_layer=DEPTH),
        deeper_by=DEPTH,
    ),
    Row(
        name="prumerge",
        shows="PruMerge, trained (Table 1).",
        changes=_method("prumerge"),
    ),
    *(
        Row(
            name=f"{reducer.replace('_', '-')}-untrained",
            shows=f"{name} in the model of the row all-tokens, without training.",
            changes=_method(reducer, **fields),
            weights_of="all-tokens",
        )
        for name, reducer, fields in (
            ("PruMerge", "prumerge", {}),
            ("PruMerge+", "prumerge_plus", {}),
            ("VisionZip with 16 tokens", "visionzip", {"reducer_tokens": 16}),
            ("DivPrune with 16 tokens", "divprune", {"reducer_tokens": 16}),
            ("FastV with 16 tokens after two layers", "fastv", {"reducer_tokens": 16, "reducer_layer": 2}),
        )
    ),
)
"""Competing methods, which have no pre-fusion."""

ROWS: tuple[Row, ...] = (
    Row(
        name="all-tokens",
        shows="LLaVA-1.5: all patches are tokens (Table 1).",
        changes=_all_tokens(0),
    ),
    Row(
        name="query-prefusion-3",
        shows="LLaVA-Mini at toy scale: one token, with the tiny model's depth of pre-fusion (Tables 1 and 6).",
        changes=_query(DEPTH),
    ),
    Row(
        name="query-prefusion-0",
        shows="One token without pre-fusion (Tables 6 and 10).",
        changes=_query(0),
    ),
    Row(
        name="no-vision-token-prefusion-3",
        shows="Pre-fusion alone: the language model reads no vision token, only the fused text.",
        changes=_pooled(DEPTH, vision_tokens_from="nowhere"),
    ),
    Row(
        name="all-tokens-deep",
        shows="All patches, with a language model as deep as pre-fusion and language model together.",
        changes=_all_tokens(0),
        deeper_by=DEPTH,
    ),
    Row(
        name="all-tokens-prefusion-3",
        shows="All patches as tokens, with pre-fusion (Table 11).",
        changes=_all_tokens(DEPTH),
    ),
    Row(
        name="query-prefusion-1",
        shows="One layer of pre-fusion (Table 6).",
        changes=_query(1),
    ),
    Row(
        name="query-prefusion-2",
        shows="Two layers of pre-fusion (Table 6).",
        changes=_query(2),
    ),
    Row(
        name="query-prefusion-4",
        shows="Four layers of pre-fusion, as many as in the paper (Tables 1 and 6).",
        changes=_query(4),
    ),
    Row(
        name="average-pool-prefusion-3",
        shows="One token by average pooling (Table 8).",
        changes=_pooled(DEPTH),
    ),
    Row(
        name="average-pool-prefusion-0",
        shows="One token by average pooling without pre-fusion: what Table 8 leaves open.",
        changes=_pooled(0),
    ),
    Row(
        name="query-4-tokens-prefusion-3",
        shows="Four tokens (Tables 7 and 8).",
        changes=_query(DEPTH, 2),
    ),
    Row(
        name="average-pool-4-tokens-prefusion-3",
        shows="Four tokens by average pooling (Table 8).",
        changes=_pooled(DEPTH, 2),
    ),
    Row(
        name="query-9-tokens-prefusion-3",
        shows="Nine tokens (Table 7).",
        changes=_query(DEPTH, 3),
    ),
    Row(
        name="query-16-tokens-prefusion-3",
        shows="Sixteen tokens (Table 7).",
        changes=_query(DEPTH, 4),
    ),
    Row(
        name="query-4-tokens-prefusion-0",
        shows="Four tokens without pre-fusion (Tables 6 and 10).",
        changes=_query(0, 2),
    ),
    Row(
        name="query-16-tokens-prefusion-0",
        shows="Sixteen tokens without pre-fusion (Tables 6 and 10).",
        changes=_query(0, 4),
    ),
    *METHODS,
    Row(
        name="query-prefusion-3-token-before",
        shows="The token goes to the language model as the reducer made it, not through pre-fusion (the paper's text).",
        changes=_query(DEPTH, vision_tokens_from="reducer"),
    ),
    Row(
        name="query-prefusion-3-released-codes",
        shows="The codes of patches are those of the one query, as in the released weights, so that they cancel.",
        changes=_query(DEPTH, position_codes="resized_query_grid"),
    ),
    Row(
        name="query-prefusion-3-random-start",
        shows="Pre-fusion starts at random instead of from the language model's first layers.",
        changes=_query(DEPTH),
        prefusion_start="random",
    ),
    Row(
        name="query-prefusion-3-vision-start",
        shows="The reducer goes on from the phase that trained the vision encoder, as the tiny model's does.",
        changes=_query(DEPTH),
        reducer_start="vision",
    ),
    Row(
        name="query-prefusion-3-things",
        shows="The training-only losses on things are on, as in the tiny model's recipe.",
        changes=_query(DEPTH),
        thing_weight=1.0,
    ),
    Row(
        name="query-prefusion-3-patches",
        shows="A training-only loss asks the token for all patches of its frame: what forces places into it.",
        changes=_query(DEPTH),
        patch_weight=1.0,
    ),
    Row(
        name="query-prefusion-3-distilled",
        shows="The model with all patches teaches it what to answer.",
        changes=_query(DEPTH),
        taught_by="all-tokens",
    ),
    Row(
        name="query-prefusion-0-distilled",
        shows="The same without pre-fusion.",
        changes=_query(0),
        taught_by="all-tokens",
    ),
    Row(
        name="no-vision",
        shows="Neither vision tokens nor pre-fusion: what the questions alone give away.",
        changes=_pooled(0, vision_tokens_from="nowhere"),
    ),
    Row(
        name="query-hd-1-token-prefusion-3",
        shows="Pictures of twice the side in five views, in one token (Table 7, 672 px in kind).",
        changes=_query(DEPTH, 1, resolution_ratio=2),
    ),
    Row(
        name="query-hd-16-tokens-prefusion-3",
        shows="Pictures of twice the side in five views, in sixteen tokens (Table 7, 672 px in kind).",
        changes=_query(DEPTH, 4, resolution_ratio=2),
    ),
)
"""The rows that begin alike, in the order in which they are trained."""

TIME_KINDS = ("direction", "order", "event count")
"""Questions about clips that ask how things change over time."""


def _about_time(name: str, shows: str, *, goes_on_from: str = "query-prefusion-3", **fields: Any) -> Row:
    return Row(name=f"time-{name}", shows=shows, goes_on_from=goes_on_from, about_time=True, **fields)


TIME_ROWS: tuple[Row, ...] = (
    _about_time("plain", "Nothing else."),
    _about_time("patches", "The token is asked for all patches of its frame.", patch_weight=1.0),
    _about_time("things", "Losses on things, which need labels that no data set has.", thing_weight=1.0),
    _about_time(
        "no-token",
        "No vision token: the fused text alone.",
        goes_on_from="no-vision-token-prefusion-3",
        changes=_pooled(DEPTH, vision_tokens_from="nowhere"),
    ),
    _about_time("all-tokens", "All patches.", goes_on_from="all-tokens", changes=_all_tokens(0)),
)
"""Rows that go on from trained ones and learn what clips alone show: what makes one token a frame keep time."""


TABLES: dict[str, tuple[str, ...]] = {
    "Methods (Table 1)": (
        "all-tokens",
        "all-tokens-deep",
        "query-prefusion-4",
        "query-prefusion-3",
        "query-prefusion-0",
        "average-pool-prefusion-0",
        *(row.name for row in METHODS),
        "no-vision",
    ),
    "Pre-fusion layers (Table 6)": (
        "query-prefusion-0",
        "query-4-tokens-prefusion-0",
        "query-16-tokens-prefusion-0",
        "query-prefusion-1",
        "query-prefusion-2",
        "query-prefusion-3",
        "query-prefusion-4",
    ),
    "Vision tokens and resolution (Table 7)": (
        "query-prefusion-3",
        "query-4-tokens-prefusion-3",
        "query-9-tokens-prefusion-3",
        "query-16-tokens-prefusion-3",
        "query-hd-1-token-prefusion-3",
        "query-hd-16-tokens-prefusion-3",
    ),
    "Query or pooling (Table 8)": (
        "average-pool-prefusion-3",
        "query-prefusion-3",
        "average-pool-4-tokens-prefusion-3",
        "query-4-tokens-prefusion-3",
        "average-pool-prefusion-0",
        "query-prefusion-0",
    ),
    "Compression alone (Table 10)": (
        "query-prefusion-0",
        "query-4-tokens-prefusion-0",
        "query-16-tokens-prefusion-0",
        "average-pool-prefusion-0",
        "mqt-2-tokens",
        "prumerge",
    ),
    "Pre-fusion alone (Table 11)": (
        "all-tokens",
        "all-tokens-prefusion-3",
        "no-vision-token-prefusion-3",
        "query-prefusion-3",
    ),
    "What the paper leaves open": (
        "query-prefusion-3",
        "query-prefusion-3-patches",
        "query-prefusion-3-token-before",
        "query-prefusion-3-released-codes",
        "query-prefusion-3-random-start",
        "query-prefusion-3-vision-start",
        "query-prefusion-3-things",
        "query-prefusion-3-distilled",
        "query-prefusion-0-distilled",
    ),
}
"""The names of rows that stand beside one another, by title. A row may stand in several."""


def rows_of(names: tuple[str, ...] = ()) -> tuple[Row, ...]:
    """Return the rows with these names, in the order of the tables; all of them without names.

    Raises:
        ValueError: There is no such row.
    """
    known = {row.name: row for row in (*ROWS, *TIME_ROWS)}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"The study has no row {unknown[0]!r}. Its rows are: {', '.join(known)}.")
    return tuple(row for name, row in known.items() if not names or name in names)


def with_needed(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return rows and those that have to be trained before them, in the order of the tables."""
    return rows_of(tuple(name for row in rows for name in (row.name, *row.needs)))
