"""One reducer per file; a table maps the names of the configuration to them."""

from llava_mini.config import LlavaMiniConfig
from llava_mini.model.reducers.average_pool import AveragePool
from llava_mini.model.reducers.base import Cost, Question, Reduced, Reducer
from llava_mini.model.reducers.divprune import DivPrune
from llava_mini.model.reducers.fastv import FastV
from llava_mini.model.reducers.identity import Identity
from llava_mini.model.reducers.llama_vid import LlamaVid
from llava_mini.model.reducers.m3 import MatryoshkaPool
from llava_mini.model.reducers.mqt import MatryoshkaQueries
from llava_mini.model.reducers.prumerge import PruMerge, PruMergePlus
from llava_mini.model.reducers.quecc import QueCC
from llava_mini.model.reducers.query import QueryReducer
from llava_mini.model.reducers.query_inside import QueryInside
from llava_mini.model.reducers.token_packer import TokenPacker
from llava_mini.model.reducers.visionzip import VisionZip
from llava_mini.model.reducers.voco import VoCo

__all__ = ["REDUCERS", "Cost", "Question", "Reduced", "Reducer", "build_reducer"]

REDUCERS: dict[str, type[Reducer]] = {
    "identity": Identity,
    "average_pool": AveragePool,
    "query": QueryReducer,
    "mqt": MatryoshkaQueries,
    "m3": MatryoshkaPool,
    "token_packer": TokenPacker,
    "quecc": QueCC,
    "llama_vid": LlamaVid,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "visionzip": VisionZip,
    "divprune": DivPrune,
    "fastv": FastV,
    "voco": VoCo,
    "query_inside": QueryInside,
}
"""By the names of ``reducer_settings``."""


def build_reducer(config: LlavaMiniConfig) -> Reducer:
    """The reducer that the configuration names."""
    return REDUCERS[config.reducer](config)
