"""A stand-in for CUDA graphs where there is no GPU."""


class Rerun:
    """Records nothing: a replay is the run itself, over the buffers. Counts what was asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.warm_ups, self.recorded, self.error = 0, 0, error

    def warm_up(self, run):
        self.warm_ups += 1
        run()

    def record(self, run):
        self.recorded += 1
        if self.error is not None:
            raise self.error
        return run
