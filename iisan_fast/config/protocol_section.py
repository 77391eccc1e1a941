"""Define the settings of the data protocol."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..setting_fields import check_settings, setting

MISSING_CAPTIONS = ("error", "title")
SPLITS = ("leave-one-out", "temporal", "given")


@dataclass(frozen=True)
class ProtocolConfig:
    """The data protocol: the users and interactions that count, and the ones that are held out."""

    # At least 4: two to train on, one to validate and one to test. The papers use 5, and 10 inputs.
    min_interactions: int = setting(
        5, help="Users with fewer interactions are left out; not for the given split.", minimum=4, maximum=1_000_000
    )
    max_inputs: int = setting(
        10, help="Items of a history that the model reads, the latest ones.", minimum=1, maximum=10_000
    )
    unescape_titles: bool = setting(True, help="Replace HTML entities in titles and captions by their characters.")
    missing_captions: str = setting(
        "error",
        help="For items without a caption, if others have one: stop with an error, or read the title.",
        choices=MISSING_CAPTIONS,
    )
    split: str = setting(
        "leave-one-out",
        help="Hold out each user's last two interactions, those after two moments (times.tsv), or those in splits.tsv.",
        choices=SPLITS,
    )
    validation_from: float = setting(0.8, help="Temporal split: share of all interactions that come before validation.")
    test_from: float = setting(0.9, help="Temporal split: share of all interactions that come before the test.")

    def __post_init__(self) -> None:
        check_settings(self)
        shares = self.validation_from, self.test_from
        if not 0 < shares[0] < shares[1] < 1:
            raise InputError(f"validation_from, test_from: expected ascending shares between 0 and 1, found {shares}")
        if self.split != "temporal" and shares != (ProtocolConfig.validation_from, ProtocolConfig.test_from):
            raise InputError(f"validation_from, test_from: {self.split} takes no shares; they are for temporal")
        if self.split == "given" and self.min_interactions != ProtocolConfig.min_interactions:
            raise InputError("min_interactions: the split given takes all users of splits.tsv; leave it out")

    @property
    def max_history(self) -> int:
        """Return how many interactions of a user leave-one-out keeps: the inputs, and three targets."""
        return self.max_inputs + 3
