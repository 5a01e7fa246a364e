"""One reducer per file; a table maps the names of the configuration to them."""

from collections.abc import Callable

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.average_pool import AveragePool
from llava_mini.model.reducers.base import Question, Reduced, Reducer
from llava_mini.model.reducers.identity import Identity
from llava_mini.model.reducers.query import QueryReducer

__all__ = ["AveragePool", "Identity", "QueryReducer", "Question", "Reduced", "Reducer", "build_reducer"]


def build_reducer(config: LlavaMiniConfig) -> Reducer:
    """The reducer that the configuration names."""
    builders: dict[str, Callable[[], Reducer]] = {
        "identity": Identity,
        "average_pool": lambda: AveragePool(config.reducer_grid),
        "query": lambda: QueryReducer(
            config.vision.hidden_size,
            grid=config.reducer_grid,
            resize_query_codes=config.position_codes == "resized_query_grid",
        ),
    }
    return builders[config.reducer]()
