"""The error tree of Paralign: everything that a user can mend is one of these.

    ParalignError            exit code 2; the message names place, value, rule and remedy
    ├── RecipeError          a recipe that cannot be run: unknown key, wrong type, parts that disagree
    │   └── LayoutError      degrees of parallelism that do not fit GPUs, model or batch
    ├── DataError            a file of samples: file:line, what was read, what was expected
    ├── WeightsError         a Hugging Face directory: missing, truncated, of another shape
    ├── CheckpointError      a native checkpoint: incomplete, or of another model
    └── TrainingError        the run itself: a loss or gradient that is not finite

Anything else that is raised is a fault of ours and keeps its traceback.
"""


class ParalignError(Exception):
    """Root of the errors that a user can mend."""


class RecipeError(ParalignError):
    """A recipe that cannot be run."""


class LayoutError(RecipeError):
    """Degrees of parallelism that do not fit the GPUs, the model or the batch."""


class DataError(ParalignError):
    """A file of samples that cannot be read as stated."""


class WeightsError(ParalignError):
    """A Hugging Face directory that cannot be read or written."""


class CheckpointError(ParalignError):
    """A native checkpoint that cannot be read or written."""


class TrainingError(ParalignError):
    """A run that cannot go on."""
