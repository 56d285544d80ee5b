"""What every way to distort a matrix has in common."""

from typing import Any, Protocol

from jaxtyping import Array, Float32


class How(Protocol):
    """A way to distort one matrix: frozen data with a short name (`str`) that parses back.

    `form()` is what is compiled and `numbers()` what is traced: two ways of one form share a compilation, so that a
    sweep over bit-widths, fractions or draws compiles once.
    """

    @property
    def draw(self) -> int:
        """Which draw, where chance has a part in it."""
        ...

    def form(self) -> "How": ...

    def numbers(self) -> Any: ...

    def round(self, w: Float32[Array, "n o"], numbers: Any, key: Array, /) -> Float32[Array, "n o"]:
        """The distorted weights `[inputs, outputs]` in their own units. Pure: it runs under jit. Each kind of chance
        folds a number of its own into the key, so that rounding, noise and permutation of one draw are independent."""
        ...
