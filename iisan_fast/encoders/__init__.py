"""Load Hugging Face encoders, which turn texts or images into hidden states, and prepare encoders for fine-tuning."""

from typing import TYPE_CHECKING

from ..doors import lazy_names

if TYPE_CHECKING:
    from .adaptation import adapt, checkpoint_blocks
    from .attention import xformers_problem
    from .base import Backbone
    from .block_layers import count_block_calls
    from .captioner import Captioner
    from .hugging_face import count_parameters, model_dtype, quiet_hugging_face
    from .image_bytes import WORKER_MODULES, ByteForm, ModelInputs
    from .layer_selection import default_layers, grouped_layers, selected_layers
    from .loading import load_backbone, load_backbones, views_by_model
    from .random_encoders import common_words, write_bert, write_resized_vit, write_vit
    from .text import TextBackbone

__all__ = [
    "Backbone",
    "ByteForm",
    "Captioner",
    "ModelInputs",
    "TextBackbone",
    "WORKER_MODULES",
    "adapt",
    "checkpoint_blocks",
    "common_words",
    "count_block_calls",
    "count_parameters",
    "default_layers",
    "grouped_layers",
    "load_backbone",
    "load_backbones",
    "model_dtype",
    "quiet_hugging_face",
    "selected_layers",
    "views_by_model",
    "write_bert",
    "write_resized_vit",
    "write_vit",
    "xformers_problem",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and takes no other name
    __getattr__ = lazy_names(__name__, __file__)
