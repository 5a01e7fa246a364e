"""What a prompt costs, part by part, from the configuration alone: operations, parameters, bytes.

There are two countings of floating-point operations for the first question about some frames:

- ``flops`` is what the code here runs: matrix products and convolutions, attention included, 2 for
  each multiply-add. The vision tower's last layer is not run, the reducer makes neither keys nor
  values, the last pre-fusion layer makes only these of the patches, and the head reads the last
  position. It equals what torch's ``FlopCounterMode`` counts.
- ``paper_flops`` is the paper's protocol: linear and convolution layers only, all of the tower's
  layers, every row in every pre-fusion layer, the head at every position. With 43 text tokens it
  gives the totals of Tables 6 to 8 and 14. Two misprints show: Table 7 has 1.81 T for three
  pre-fusion layers, which is 1.71 T; and Table 14 divides the totals wrongly, for pre-fusion is
  1.00 T of LLaVA-Mini's 1.96 T, not 0.125 T (and its total at 672 px, 7.19 T, is 8.13 T in the text).

``later_question_flops`` counts, as ``flops`` does, what another question about the same frames
costs where the keys and values of all that stands before it are kept.

What a reducer takes, its class says itself (``Reducer.cost``).

Shapes: F frames, V views, P patches of a frame, Q reduced tokens, T text tokens, S = F * Q + T.
"""

from dataclasses import dataclass, fields
from typing import Any, cast

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers import REDUCERS, Cost

PAPER_TEXT_TOKENS = 43
"""Text tokens in the paper's measurements, found by solving for its totals."""

QUESTION_TOKENS = 15
"""Those among them after the frame: what the reducers that read the question are counted with."""

BYTES_PER_VALUE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of one number in each format."""


@dataclass(frozen=True, kw_only=True)
class ByPart:
    """One whole number for each part, named as the model names it."""

    vision_tower: int
    reducer: int
    projector: int
    prefusion: int
    language_model: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.as_dict().values())

    def as_dict(self) -> dict[str, int]:
        """Numbers by part, in the order in which data travels."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def flops(
    config: LlavaMiniConfig,
    *,
    num_frames: int = 1,
    num_text_tokens: int = PAPER_TEXT_TOKENS,
    num_question_tokens: int = QUESTION_TOKENS,
    num_vision_tokens: int | None = None,
) -> ByPart:
    """Operations of the code here, from pixels to the first token of the answer to the first question.

    Args:
        config: the model.
        num_frames: frames in the prompt; without any, text is not fused.
        num_text_tokens: all tokens of the prompt that are words, system prompt included.
        num_question_tokens: those after the first frame, as far as there are so many; some reducers read them.
        num_vision_tokens: of all frames, for a reducer that gives them different numbers. None: the published average.
    """
    _check_prompt(num_frames, num_text_tokens)
    reducer = _reducer_cost(config, num_text_tokens, num_question_tokens)
    vision = config.vision
    rows = config.patches_per_side**2 + 1  # with the class token
    one_view = _patch_embedding(config) + (vision.num_hidden_layers - 1) * (
        rows * _tower_layer(config) + 4 * rows**2 * vision.hidden_size
    )

    decoder = _Decoder(config.text)
    asked = _rows_read_before(config, min(num_text_tokens, num_question_tokens) if num_frames else 0)
    language_model = _whole_prompt(config, reducer, num_frames, num_text_tokens, num_vision_tokens)
    language_model += config.text.num_hidden_layers * decoder.layer(asked, asked)
    return ByPart(
        vision_tower=num_frames * config.views_per_frame * (one_view + reducer.of_tower),
        reducer=num_frames * reducer.per_frame + (reducer.shared if num_frames else 0),
        projector=num_frames * _projected(config, reducer) * _projector(config),
        prefusion=num_frames * _two_passes(config, decoder, num_text_tokens),
        language_model=language_model,
    )


def paper_flops(
    config: LlavaMiniConfig,
    *,
    num_frames: int = 1,
    num_text_tokens: int = PAPER_TEXT_TOKENS,
    num_question_tokens: int = QUESTION_TOKENS,
    num_vision_tokens: int | None = None,
) -> ByPart:
    """Operations as the paper counts them, for the code of each method's authors.

    The released code projects all patches also where nothing reads them (Table 6, no pre-fusion).

    Args:
        config: the model.
        num_frames: frames in the prompt, each passed with the whole text.
        num_text_tokens: all tokens of the prompt that are words.
        num_question_tokens: those after the first frame, as far as there are so many; some reducers read them.
        num_vision_tokens: of all frames, for a reducer that gives them different numbers. None: the published average.
    """
    _check_prompt(num_frames, num_text_tokens)
    reducer = _reducer_cost(config, num_text_tokens, num_question_tokens)
    tokens = _vision_tokens(config, num_frames, num_vision_tokens)
    projected = tokens if reducer.published_projected is None else num_frames * reducer.published_projected
    rows = config.patches_per_side**2 + 1
    one_view = _patch_embedding(config) + config.vision.num_hidden_layers * rows * _tower_layer(config)
    decoder = _Decoder(config.text)
    fused_rows = _prefusion_rows(config) + num_text_tokens
    lengths = rows_of_layers(config, num_frames, num_text_tokens, num_vision_tokens)
    again = num_frames * _rows_read_before(config, min(num_text_tokens, num_question_tokens))  # for each frame
    return ByPart(
        vision_tower=num_frames * config.views_per_frame * one_view,
        reducer=num_frames * reducer.published,
        projector=projected * _projector(config),
        prefusion=num_frames * config.prefusion_num_layers * fused_rows * decoder.linear,
        language_model=sum(length + again for length in lengths) * decoder.linear
        + (lengths[-1] + again) * decoder.head,
    )


def later_question_flops(
    config: LlavaMiniConfig,
    *,
    num_frames: int = 1,
    num_text_tokens: int = PAPER_TEXT_TOKENS,
    num_kept_tokens: int = 0,
    num_vision_tokens: int | None = None,
) -> ByPart:
    """Operations of another question about frames that were read before, up to the first token of its answer.

    Vision is not run. In pre-fusion the keys and values of the vision rows and of the text that is the same
    for all questions are kept for each frame, and the question's rows run against them. The language model
    keeps its keys and values of that text and the frames, and runs the question's rows and the head. Where tokens
    depend on the question, what is kept of a frame is reduced again, and the language model reads the frames anew.
    Where frames differ in the number of their tokens, they are reduced again as well. Where rows are dropped inside
    the language model, it reads the whole prompt anew.

    Args:
        config: the model.
        num_frames: frames in the prompt; without any, text is not fused.
        num_text_tokens: tokens of the question, from the first one that differs to the end of the prompt.
        num_kept_tokens: tokens of text before them, the system prompt for one; they are not run again.
        num_vision_tokens: as in ``flops``.

    Raises:
        ValueError: the question has no tokens, or a number is negative.
    """
    _check_prompt(num_frames, num_text_tokens)
    if num_text_tokens == 0 or num_kept_tokens < 0:
        raise ValueError(
            f"A later question has tokens of its own, after none or more that are kept; got {num_text_tokens} after "
            f"{num_kept_tokens}."
        )
    decoder, tokens = _Decoder(config.text), _vision_tokens(config, num_frames, num_vision_tokens)
    reducer, projected, rows = Cost(), 0, num_text_tokens
    again = _reducer_cost(config, num_text_tokens, num_text_tokens)
    has_other_tokens = REDUCERS[config.reducer].reads_question
    if has_other_tokens or again.mean_tokens is not None:
        reducer, projected = again, _projected(config, again)
    if has_other_tokens:
        rows += tokens
    read = decoder.layer(rows, tokens + num_kept_tokens + num_text_tokens)
    language_model = config.text.num_hidden_layers * read + decoder.head
    if REDUCERS[config.reducer].drops_inside:
        reducer = again
        language_model = _whole_prompt(config, again, num_frames, num_kept_tokens + num_text_tokens, num_vision_tokens)
    fused_keys = _prefusion_rows(config) + num_kept_tokens + num_text_tokens
    asked = _rows_read_before(config, num_text_tokens)
    return ByPart(
        vision_tower=0,
        reducer=num_frames * reducer.per_frame + (reducer.shared if num_frames else 0),
        projector=num_frames * projected * _projector(config),
        prefusion=num_frames * config.prefusion_num_layers * decoder.layer(num_text_tokens, fused_keys),
        language_model=language_model + config.text.num_hidden_layers * decoder.layer(asked, asked),
    )


def parameters(config: LlavaMiniConfig) -> ByPart:
    """Parameters of each part, those included that are stored and never run."""
    vision, text = config.vision, config.text
    width, inner, language = vision.hidden_size, vision.intermediate_size, text.hidden_size
    tower_layer = 4 * (width**2 + width) + 2 * width * inner + inner + width + 4 * width
    embeddings = width + _pixels_of_a_patch(config) * width + (config.patches_per_side**2 + 1) * width
    biases = 0 if REDUCERS[config.reducer].has_linear_projector else 2 * language
    decoder_layer = _Decoder(text).layer_parameters
    table = text.vocab_size * language
    return ByPart(
        vision_tower=embeddings + vision.num_hidden_layers * tower_layer + 4 * width,
        reducer=REDUCERS[config.reducer].cost(config, 0).parameters,
        projector=_projector(config) // 2 + biases,
        prefusion=config.prefusion_num_layers * decoder_layer,
        language_model=table * (1 if config.tie_word_embeddings else 2)
        + text.num_hidden_layers * decoder_layer
        + language,
    )


def rows_of_layers(
    config: LlavaMiniConfig, num_frames: int, num_text_tokens: int, num_vision_tokens: int | None = None
) -> list[int]:
    """How many rows of a prompt each layer of the language model gets: fewer from where a reducer drops some.

    Args:
        config: the model.
        num_frames: frames in the prompt.
        num_text_tokens: all tokens of the prompt that are words.
        num_vision_tokens: as in ``flops``.
    """
    num_layers, later = config.text.num_hidden_layers, REDUCERS[config.reducer].cost(config, 0).later_tokens
    first = num_layers if later is None else config.reducer_layer
    whole = _vision_tokens(config, num_frames, num_vision_tokens)
    tokens = [whole] * first + [num_frames * (later or 0)] * (num_layers - first)
    return [number + num_text_tokens for number in tokens]


def weight_bytes(config: LlavaMiniConfig, dtype: str = "bfloat16") -> ByPart:
    """Bytes of the weights in one number format.

    Raises:
        ValueError: the format is not one of ``BYTES_PER_VALUE``.
    """
    size = _value_bytes(dtype)
    return ByPart(**{name: size * count for name, count in parameters(config).as_dict().items()})


def keys_values_bytes_per_token(config: LlavaMiniConfig, dtype: str = "bfloat16") -> int:
    """Bytes that one token of the prompt or the answer keeps in the language model's cache."""
    return config.text.num_hidden_layers * _Decoder(config.text).keys_values * _value_bytes(dtype)


def prefusion_bytes_per_frame(config: LlavaMiniConfig, dtype: str = "bfloat16") -> int:
    """Bytes of the vision rows' keys and values in pre-fusion: what another question about a frame needs."""
    rows = config.prefusion_num_layers * _prefusion_rows(config)
    return rows * _Decoder(config.text).keys_values * _value_bytes(dtype)


class _Decoder:
    """Operations and parameters of one decoder layer of a Llama-like language model."""

    def __init__(self, text: Any) -> None:
        width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        head_width = getattr(text, "head_dim", None) or width // heads
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        self.query_width = heads * head_width
        self.keys_values = 2 * key_heads * head_width  # values per row
        self.key_value_linear = 2 * width * self.keys_values
        self.linear = 2 * (2 * width * self.query_width + 3 * width * inner) + self.key_value_linear
        self.head = 2 * width * text.vocab_size

        with_bias = getattr(text, "attention_bias", False) or text.model_type == "qwen2"
        biases = (self.query_width + self.keys_values) if with_bias else 0
        if with_bias and text.model_type != "qwen2":
            biases += width  # of the output projection
        if getattr(text, "mlp_bias", False):
            biases += 2 * inner + width
        head_norms = 2 * head_width if text.model_type == "qwen3" else 0
        self.layer_parameters = self.linear // 2 + biases + head_norms + 2 * width

    def layer(self, num_rows: int, num_keys: int) -> int:
        """Operations of ``num_rows`` rows that attend to ``num_keys`` rows, their own included."""
        return num_rows * self.linear + 4 * num_rows * num_keys * self.query_width


def _whole_prompt(
    config: LlavaMiniConfig, reducer: Cost, num_frames: int, num_text: int, num_vision_tokens: int | None
) -> int:
    """Operations of the language model on a prompt, from its first row on to the head at the last one."""
    decoder, rows = _Decoder(config.text), rows_of_layers(config, num_frames, num_text, num_vision_tokens)
    besides = rows[0] * reducer.per_row + reducer.per_prompt if num_frames else 0
    return sum(decoder.layer(number, number) for number in rows) + besides + decoder.head


def _two_passes(config: LlavaMiniConfig, decoder: _Decoder, num_text: int) -> int:
    """Operations of pre-fusion for one frame: vision rows, then text rows against them."""
    if config.prefusion_num_layers == 0:
        return 0
    rows = _prefusion_rows(config)
    num_outputs = config.tokens_per_frame if config.vision_tokens_from == "prefusion" else 0
    vision = (config.prefusion_num_layers - 1) * decoder.layer(rows, rows)
    vision += (rows - num_outputs) * decoder.key_value_linear + decoder.layer(num_outputs, rows)
    return vision + config.prefusion_num_layers * decoder.layer(num_text, rows + num_text)


def _prefusion_rows(config: LlavaMiniConfig) -> int:
    """Vision rows of a frame in pre-fusion: patches, and reduced tokens where they pass through."""
    passes = not REDUCERS[config.reducer].keeps_patches and config.vision_tokens_from == "prefusion"
    return config.patches_per_frame + (config.tokens_per_frame if passes else 0)


def _patch_embedding(config: LlavaMiniConfig) -> int:
    """Operations of the convolution that cuts one view into patches."""
    return 2 * config.patches_per_side**2 * _pixels_of_a_patch(config) * config.vision.hidden_size


def _pixels_of_a_patch(config: LlavaMiniConfig) -> int:
    """Values of one patch in three colours."""
    return 3 * cast(int, config.vision.patch_size) ** 2


def _tower_layer(config: LlavaMiniConfig) -> int:
    """Operations of one row in the linear layers of one CLIP layer."""
    width = config.vision.hidden_size
    return 2 * (4 * width**2 + 2 * width * config.vision.intermediate_size)


def _projector(config: LlavaMiniConfig) -> int:
    """Operations of one row."""
    width, language = config.vision.hidden_size, config.text.hidden_size
    is_linear = REDUCERS[config.reducer].has_linear_projector
    return 2 * (width * language + (0 if is_linear else language**2))


def _projected(config: LlavaMiniConfig, reducer: Cost) -> int:
    """Rows of a frame that the projector maps here. Patches that pre-fusion reads are mapped once."""
    rows = config.tokens_per_frame if reducer.projected is None else reducer.projected
    if not config.prefusion_num_layers:
        return rows
    are_patches = REDUCERS[config.reducer].keeps_patches or REDUCERS[config.reducer].reads_projected
    return config.patches_per_frame + (0 if are_patches else rows)


def _rows_read_before(config: LlavaMiniConfig, num_question_tokens: int) -> int:
    """Rows in which the language model reads the question alone, for reducers that want its hidden states."""
    return max(num_question_tokens, 1) if REDUCERS[config.reducer].reads_hidden else 0


def _reducer_cost(config: LlavaMiniConfig, num_text_tokens: int, num_question_tokens: int) -> Cost:
    return REDUCERS[config.reducer].cost(config, min(num_text_tokens, num_question_tokens))


def tokens_of_frame(config: LlavaMiniConfig) -> int:
    """Tokens of a frame that the language model reads: the published average where frames differ in their number."""
    if config.vision_tokens_from == "nowhere":
        return 0
    mean = REDUCERS[config.reducer].cost(config, 0).mean_tokens
    return config.tokens_per_frame if mean is None else mean


def _vision_tokens(config: LlavaMiniConfig, num_frames: int, given: int | None) -> int:
    """Tokens of all frames."""
    usual, most = tokens_of_frame(config), config.tokens_per_frame
    least = min(usual, 1) if usual != most else most
    if given is not None and not num_frames * least <= given <= num_frames * most:
        each = f"{most}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"num_vision_tokens is {given}, but with the reducer {config.reducer!r} a frame has {each}, and there are "
            f"{num_frames}. Leave it out, or correct it."
        )
    return num_frames * usual if given is None else given


def _check_prompt(num_frames: int, num_text_tokens: int) -> None:
    if num_frames < 0 or num_text_tokens < 0 or num_frames + num_text_tokens == 0:
        raise ValueError(
            f"A prompt has frames, text tokens or both; got {num_frames} frames and {num_text_tokens} text tokens."
        )


def _value_bytes(dtype: str) -> int:
    if dtype not in BYTES_PER_VALUE:
        raise ValueError(f"There is no number format {dtype!r}. Known are: {', '.join(BYTES_PER_VALUE)}.")
    return BYTES_PER_VALUE[dtype]
