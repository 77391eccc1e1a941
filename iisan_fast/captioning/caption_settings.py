"""The settings of captioning, apart from the code that captions, which imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import ENCODER_DTYPES, ViewConfig
from ..setting_fields import check_settings, same_setting, setting


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of captioning beside its model and its pictures."""

    prompt: str | None = setting(
        None,
        help="Question to a model that chats; for another model, the first words of each caption.",
        automatic="a request for a description, or no words",
    )
    frames_per_item: int = setting(4, help="Video frames of an item, evenly spread, that the model sees.", minimum=1)
    max_tokens: int = setting(64, help="Tokens of a caption at most.", minimum=1)
    batch_size: int = setting(8, help="Items that are captioned at a time.", minimum=1)
    dtype: str = setting(
        "auto",
        help="Data type of the model's weights; in float32, a caption does not depend on its batch.",
        choices=ENCODER_DTYPES,
        automatic="bfloat16 on CUDA, else float32",
    )
    trust_remote_code: bool = same_setting(ViewConfig, "trust_remote_code")
    missing_images: str = setting(
        "error",
        help="For images that are missing or cannot be read: stop with an error, or skip the items.",
        choices=("error", "skip"),
    )
    workers: int | None = setting(
        None,
        help="Processes that check the images first; 0 is none.",
        minimum=0,
        automatic="by idle CPUs and the number of images",
    )

    def __post_init__(self) -> None:
        check_settings(self)
