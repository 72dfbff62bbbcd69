"""Block sizes of the decode kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeBlockSizes:
    """What one grid step takes."""

    page: int = 1088
    """Entries, where all visible ones are attended to: a multiple of 16. The pages of a cache are equal, so that one of
    1024 + 1 entries is one page."""
    sequences: int = 8
    """Sequences, where there is only the window."""
    paged_sequences: int = 8
    """Sequences, where a page holds all entries: their softmaxes wait for each other's products."""

    def __post_init__(self) -> None:
        if self.page < 16 or self.page % 16:
            raise ValueError(f"page: got {self.page}, need a positive multiple of 16")
        if min(self.sequences, self.paged_sequences) < 1:
            raise ValueError(f"sequences: got {self.sequences} and {self.paged_sequences}, need at least 1")
