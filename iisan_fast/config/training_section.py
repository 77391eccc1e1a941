"""Define the settings of the optimisation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError
from ..intervals import Interval
from ..setting_fields import check_settings, setting
from .method_names import LEARNING_RATES

PRECISIONS = ("auto", "float32", "bfloat16")
LOSSES = ("in-batch", "full", "sampled", "gbce")
GBCE_NEGATIVES = 256  # drawn for a step if the loss gbce has no number
NEGATIVES = ("global", "local")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation: Adam, one learning rate a parameter group, early stop on validation HR@10."""

    batch_users: int = setting(64, help="Users in a batch.", minimum=1, maximum=10_000_000)
    max_epochs: int = setting(100, help="Epochs at most.", minimum=1, maximum=1_000_000)
    patience: int = setting(
        10,
        help="Stop once more than so many epochs bring no better validation HR@10.",
        minimum=0,
        maximum=1_000_000,
    )
    seed: int = setting(0, help="Seed of weights, batches and dropout.", minimum=0, maximum=2**63 - 1)
    checkpoint_every: str | int | None = setting(
        None,
        help="Save within epochs too, after so many steps (500) or so much time (90s, 10m, 2h); results do not change.",
        automatic="after each epoch",
    )
    precision: str = setting(
        "auto",
        help="Precision of the trained matrix products; on a CPU, bfloat16 is for fine-tuned encoders.",
        choices=PRECISIONS,
        automatic="bfloat16 on CUDA, else float32",
    )
    learning_rates: Mapping[str, float] = setting(
        {},
        help="Learning rate of a parameter group; by method, the groups are "
        f"{', '.join(dict.fromkeys(group for rates in LEARNING_RATES.values() for group in rates))}.",
        minimum=0,
        below=1,
        automatic="the method's own",
    )
    reverse: bool = setting(
        False, help="Train on each training history a second time, in reverse order, as the history of one more user."
    )
    loss: str = setting(
        "in-batch",
        help="Cross-entropy over the batch's items (in-batch), all items of training (full) or N drawn ones "
        "(sampled:N), or gSASRec's binary loss (gbce:N).",
    )
    debias: bool | None = setting(
        None,
        help="Subtract log popularity from the scores of the in-batch loss.",
        automatic="on for in-batch, else off",
    )
    own_mask: bool = setting(True, help="Leave the user's items out of the loss's negatives.")
    negatives: str = setting(
        "global",
        help="On several ranks, a row's negatives are the items of all ranks' users (global) or of its own rank's "
        "(local).",
        choices=NEGATIVES,
    )
    weight_decay: float = setting(
        0.0,
        help="Decoupled weight decay (AdamW) of matrices and item id vectors, times the learning rate; 0: none.",
        minimum=0,
        maximum=100,
    )
    schedule: str = setting(
        "constant",
        help="Learning rates after the warm-up: constant, or falling to 0 at the end of the last epoch.",
        choices=SCHEDULES,
    )
    warmup_epochs: float = setting(
        0.0, help="Epochs in which the learning rates rise from 0; 0.5 is half an epoch.", minimum=0, maximum=1_000_000
    )
    clip_norm: float | None = setting(
        None,
        help="Scale the gradients down to this L2 norm if the norm of all together is larger.",
        minimum=0,
        maximum=1_000_000,
        automatic="none",
    )
    ema_decay: float = setting(
        0.0,
        help="Decay of a moving average of the weights; validation and the best checkpoint take the average; 0: none.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if (interval := self.checkpoint_interval) is not None and interval.steps is not None:
            object.__setattr__(self, "checkpoint_every", interval.steps)  # a number, also if it was text
        if self.clip_norm == 0:
            raise InputError("clip_norm: expected a number above 0, found 0; leave it out for no clipping")
        if self.warmup_epochs > self.max_epochs:
            raise InputError(
                f"warmup_epochs: expected at most max_epochs ({self.max_epochs}), found {self.warmup_epochs:g}"
            )
        kind, _ = self.loss_and_negatives
        if self.debias and kind != "in-batch":
            raise InputError(
                f"debias: corrects the popularity of in-batch negatives; {self.loss} has none of them, leave it out"
            )

        if self.negatives == "local" and kind != "in-batch":
            raise InputError(
                f"negatives: local takes those of a rank's own users for the loss in-batch; {self.loss} takes the same "
                "on all ranks, leave it out"
            )

    @property
    def loss_and_negatives(self) -> tuple[str, int]:
        """Return the loss, one of LOSSES, and how many negatives are drawn for each step; 0 if none are.

        Raises InputError for another loss.
        """
        kind, colon, number = self.loss.partition(":")
        drawn = kind in ("sampled", "gbce")
        if kind == "gbce" and not colon:
            return kind, GBCE_NEGATIVES
        if kind in LOSSES and bool(colon) == drawn and (not drawn or re.fullmatch("0*[1-9][0-9]{0,8}", number)):
            return kind, int(number or 0)
        raise InputError(
            f"loss: expected in-batch, full, sampled:N, gbce or gbce:N, N from 1 to 999999999, found {self.loss!r}"
        )

    @property
    def debiased(self) -> bool:
        """Return True if log popularity is subtracted from the loss's scores."""
        return self.loss == "in-batch" if self.debias is None else self.debias

    @property
    def scheduled(self) -> bool:
        """Return True if the learning rates change from step to step."""
        return self.schedule != "constant" or self.warmup_epochs > 0

    @property
    def checkpoint_interval(self) -> Interval | None:
        """Return the interval between two checkpoints within an epoch; None for no such checkpoints."""
        return None if self.checkpoint_every is None else Interval.of(self.checkpoint_every, "checkpoint_every")
