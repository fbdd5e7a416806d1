# SPDX-License-Identifier: MIT
"""What can go wrong beyond bad arguments (those are ValueError and TypeError)."""


class BackendUnavailable(RuntimeError):  # noqa: N818 - public name, fixed by the API
    """A backend was asked for by name and cannot run this call; the message says why and what to do."""


class InferenceDiverged(RuntimeError):  # noqa: N818 - public name, fixed by the API
    """A state became non-finite. `layer` (1-based) is the first hit; `step` the move (None unless traced)."""

    def __init__(self, layer: int, step: int | None):
        self.layer, self.step = layer, step
        when = "; trace=True names the step" if step is None else f" at step {step}"
        super().__init__(
            f"inference diverged: the state of layer {layer} is not finite{when}. "
            "Lower lr (or lr_scale), or check x, the target and the weights for NaN and infinity."
        )

    def __reduce__(self) -> tuple[type, tuple[int, int | None]]:
        """A pickle is made anew from the numbers: worker processes send their exceptions so."""
        return type(self), (self.layer, self.step)
