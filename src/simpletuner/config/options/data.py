"""Where the datasets are listed."""

from simpletuner.config.options.kinds import PathText, Slice


class DataOptions(Slice):
    """Data."""

    data_backend_config: PathText | None = None
    """The file that lists the datasets; by default `multidatabackend.json` beside the config."""
